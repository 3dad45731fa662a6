"""The rows about what jobs have and do. `@` is explained in `panels.py`."""

from __future__ import annotations

from deploy.grafana.panels import Kind, Panel, Query

NODE = "{{instance}}"

OVERVIEW = [
    Panel(
        "Nodes that answer",
        "Daemons that Prometheus could scrape last.",
        "short",
        [Query("sum(up{@})")],
        Kind.NUMBER,
        4,
        ["PeermemDown", "PeermemUnseen"],
    ),
    Panel(
        "Nodes not ready",
        "Daemons that run and take no work.",
        "short",
        [Query("count(peermem_ready{@} == 0) or vector(0)")],
        Kind.NUMBER,
        4,
        ["PeermemNotReady", "PeermemRestarting"],
    ),
    Panel(
        "Bandwidth",
        "Bytes that transfers of all these nodes move. Each transfer is counted once, by the node that runs it.",
        "binBps",
        [Query("sum(rate(peermem_transfer_bytes_total{@}[$__rate_interval]))")],
        Kind.NUMBER,
        4,
    ),
    Panel(
        "Transfers that fail",
        "Share of the transfers that ended.",
        "percentunit",
        [
            Query(
                'sum(rate(peermem_transfers_total{@, outcome="failed"}[$__rate_interval]))'
                " / (sum(rate(peermem_transfers_total{@}[$__rate_interval])) > 0)"
            )
        ],
        Kind.NUMBER,
        4,
        ["PeermemTransfersFailing"],
    ),
    Panel("Regions", "Regions there are.", "short", [Query("sum(peermem_regions{@})")], Kind.NUMBER, 4),
    Panel(
        "Staged bytes",
        "Share of the bytes that the CPU had to copy.",
        "percentunit",
        [
            Query(
                'sum(rate(peermem_transfer_bytes_total{@, path="STAGED"}[$__rate_interval]))'
                " / (sum(rate(peermem_transfer_bytes_total{@}[$__rate_interval])) > 0)"
            )
        ],
        Kind.NUMBER,
        4,
        ["PeermemStagedThoughDirectWorks"],
    ),
    Panel(
        "Alerts that fire",
        "Alerts of peermem, by name. Each has its page.",
        "short",
        [Query('sum by (alertname, severity) (ALERTS{@, alertname=~"Peermem.+", alertstate="firing"})')],
        Kind.STACK,
        12,
    ),
    Panel(
        "Daemons",
        "What runs where.",
        "string",
        [Query("peermem_build_info{@}")],
        Kind.TABLE,
        12,
        hidden=["__name__", "cluster", "job"],
    ),
]

TRANSFERS = [
    Panel(
        "Bandwidth by fabric and path",
        "How bytes cross, and how the region here was reached. HOST is ordinary memory; STAGED is copied by the CPU.",
        "binBps",
        [
            Query(
                "sum by (fabric, path) (rate(peermem_transfer_bytes_total{@}[$__rate_interval]))", "{{fabric}} {{path}}"
            )
        ],
        Kind.STACK,
        12,
        ["PeermemStagedThoughDirectWorks"],
    ),
    Panel(
        "Bandwidth by node",
        "Of the transfers that a node runs; others use its regions beside these.",
        "binBps",
        [Query("topk(10, sum by (instance) (rate(peermem_transfer_bytes_total{@}[$__rate_interval])))", NODE)],
        Kind.LINES,
        12,
    ),
    Panel(
        "Latency",
        "Time from a transfer's acceptance to its success, over all nodes. With tracing on, dots are single transfers.",
        "s",
        [
            Query(
                'sum by (le) (increase(peermem_transfer_duration_seconds_bucket{@, outcome="succeeded", '
                'direction!="relayed"}[$__rate_interval]))',
                "{{le}}",
                exemplars=True,
            )
        ],
        Kind.HEAT,
        12,
        ["PeermemTransferLatencyHigh"],
    ),
    Panel(
        "Latency by fabric",
        "The median, and what 1 in 100 takes longer than. It depends on sizes: see them beside.",
        "s",
        [
            Query(
                f"histogram_quantile({quantile}, sum by (le, fabric) (rate(peermem_transfer_duration_seconds_bucket"
                '{@, outcome="succeeded", direction!="relayed"}[$__rate_interval])))',
                f"{name} {{{{fabric}}}}",
                exemplars=True,
            )
            for name, quantile in (("p50", 0.5), ("p99", 0.99))
        ],
        Kind.LINES,
        12,
        ["PeermemTransferLatencyHigh"],
    ),
    Panel(
        "Size",
        "Bytes that transfers were asked to move.",
        "bytes",
        [
            Query(
                'sum by (le) (increase(peermem_transfer_size_bytes_bucket{@, direction!="relayed"}[$__rate_interval]))',
                "{{le}}",
            )
        ],
        Kind.HEAT,
    ),
    Panel(
        "Transfers that end",
        "A second, by outcome.",
        "ops",
        [Query("sum by (outcome) (rate(peermem_transfers_total{@}[$__rate_interval]))", "{{outcome}}")],
        Kind.STACK,
    ),
    Panel(
        "Failures by reason",
        "A second. Reasons are those of the errors that jobs get.",
        "ops",
        [
            Query(
                "topk(10, sum by (reason) (rate(peermem_transfer_failures_total{@}[$__rate_interval])) > 0)",
                "{{reason}}",
            ),
            Query(
                "topk(10, sum by (reason) (rate(peermem_transfer_refusals_total{@}[$__rate_interval])) > 0)",
                "not begun: {{reason}}",
            ),
            Query(
                "topk(10, sum by (reason) (rate(peermem_storage_failures_total{@}[$__rate_interval])) > 0)",
                "storage: {{reason}}",
            ),
        ],
        Kind.STACK,
        alerts=["PeermemTransfersFailing", "PeermemStorageFailing"],
    ),
    Panel(
        "Transfers that run",
        "Accepted, and not ended.",
        "short",
        [Query("sum by (instance) (peermem_running_transfers{@})", NODE)],
        Kind.STACK,
    ),
    Panel(
        "Loads and stores",
        "Bytes between files and regions, by way: DIRECT between disk and region, STAGED by a copy, BUFFERED by the "
        "page cache.",
        "binBps",
        [
            Query(
                "sum by (operation, way) (rate(peermem_storage_bytes_total{@}[$__rate_interval]))",
                "{{operation}} {{way}}",
            )
        ],
        Kind.STACK,
        alerts=["PeermemStorageFailing"],
    ),
    Panel(
        "Loads and stores that end",
        "A second, by outcome.",
        "ops",
        [
            Query(
                "sum by (operation, outcome) (rate(peermem_storage_duration_seconds_count{@}[$__rate_interval]))",
                "{{operation}} {{outcome}}",
            )
        ],
        Kind.STACK,
        alerts=["PeermemStorageFailing"],
    ),
]

PATHS = [
    Panel(
        "Share of bytes by path",
        "Over verbs P2PDMA, DMABUF and LEGACY_PEER_MEMORY mean that the NIC reaches device memory, and STAGED that the "
        "CPU copies. Over tcp and local the CPU moves the bytes by whatever path.",
        "percentunit",
        [
            Query(
                "sum by (fabric, path) (rate(peermem_transfer_bytes_total{@}[$__rate_interval]))"
                " / ignoring (fabric, path) group_left () "
                "(sum(rate(peermem_transfer_bytes_total{@}[$__rate_interval])) > 0)",
                "{{fabric}} {{path}}",
            )
        ],
        Kind.STACK,
    ),
    Panel(
        "Staged share by device",
        "The devices whose bytes are copied most. Why is in the table below.",
        "percentunit",
        [
            Query(
                'topk(10, sum by (instance, device) (rate(peermem_transfer_bytes_total{@, path="STAGED"}'
                "[$__rate_interval])) / (sum by (instance, device) "
                "(rate(peermem_transfer_bytes_total{@}[$__rate_interval])) > 0))",
                "{{instance}} {{device}}",
            )
        ],
        alerts=["PeermemStagedThoughDirectWorks"],
    ),
    Panel(
        "Device and NIC pairs that work",
        "Trials whose last outcome moved the right bytes, by path, beside those that did not.",
        "short",
        [
            Query("sum by (path) (peermem_path_works{@})", "{{path}} works"),
            Query("count by (path) (peermem_path_works{@} == 0)", "{{path}} fails"),
        ],
    ),
    Panel(
        "How each device is reached, and why",
        "The path of its regions, the best path of its kind, and what keeps it from that: none, untried, verbs_off, "
        "or the reason of an error. `peermemctl preflight` has the whole story.",
        "string",
        [Query("peermem_device_path_info{@}")],
        Kind.TABLE,
        12,
        ["PeermemStagedThoughDirectWorks"],
        ["__name__", "cluster", "job"],
    ),
    Panel(
        "What each pair of device and NIC did in its last trial",
        "Value 1: the right bytes moved.",
        "short",
        [Query("sum by (instance, device, nic, path) (peermem_path_works{@})")],
        Kind.TABLE,
        12,
    ),
]

REGIONS = [
    Panel(
        "Regions",
        "By the kind of device.",
        "short",
        [Query("sum by (kind) (peermem_regions{@})", "{{kind}}")],
        Kind.STACK,
        alerts=["PeermemRegionsNearLimit"],
    ),
    Panel(
        "Bytes of regions",
        "By the kind of device.",
        "bytes",
        [Query("sum by (kind) (peermem_region_bytes{@})", "{{kind}}")],
        Kind.STACK,
    ),
    Panel(
        "Fullest devices",
        "Share of a device's bytes that regions hold.",
        "percentunit",
        [
            Query(
                'topk(10, 1 - peermem_device_available_bytes{@, kind!="adopted"}'
                ' / (peermem_device_size_bytes{@, kind!="adopted"} > 0))',
                "{{instance}} {{device}}",
            )
        ],
        alerts=["PeermemDeviceNearlyFull"],
    ),
    Panel(
        "Regions beside their limit",
        "Of a node's region.max_regions.",
        "percentunit",
        [
            Query(
                "topk(10, sum by (cluster, job, instance) (peermem_regions{@})"
                " / on (cluster, job, instance) peermem_regions_limit{@})",
                NODE,
            )
        ],
        alerts=["PeermemRegionsNearLimit"],
    ),
    Panel(
        "What keeps regions",
        "Regions by lease: none (until somebody deletes them), session (while the job lives), ttl (until it is not "
        "renewed); and jobs on the attach socket.",
        "short",
        [
            Query("sum by (kind) (peermem_leases{@})", "lease: {{kind}}"),
            Query("sum(peermem_attach_sessions{@})", "sessions"),
        ],
        alerts=["PeermemLeasesLeaked"],
    ),
    Panel(
        "Leases that end",
        "Regions that were deleted a second, because the job ended or did not renew.",
        "ops",
        [Query("sum by (reason) (rate(peermem_lease_expirations_total{@}[$__rate_interval]))", "{{reason}}")],
        alerts=["PeermemLeasesExpire"],
    ),
    Panel(
        "Grants",
        "Rights on ranges of regions: given to remote nodes, and held from them. Without transfers there are none.",
        "short",
        [Query("sum by (side) (peermem_grants{@})", "{{side}}")],
        alerts=["PeermemGrantsLeaked"],
    ),
    Panel(
        "Tenants nearest to a limit",
        "Highest use by any one tenant of a node, as a share of its limit. Metrics name no tenants.",
        "percentunit",
        [Query("max by (resource) (peermem_tenant_highest_use_ratio{@})", "{{resource}}")],
        alerts=["PeermemTenantNearLimit"],
    ),
]
