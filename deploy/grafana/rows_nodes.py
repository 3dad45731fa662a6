"""The rows about nodes: their NICs, whom they refuse, and the daemons themselves. `@` is explained in `panels.py`."""

from __future__ import annotations

from deploy.grafana.panels import Kind, Panel, Query

NODE = "{{instance}}"
PORT = "{{instance}} {{device}}/{{port}}"

NICS = [
    Panel(
        "Utilisation",
        "Bytes a second of a port as a share of its rate, each direction for itself.",
        "percentunit",
        [
            Query(
                f"topk(10, rate(node_infiniband_port_data_{way}_bytes_total{{@}}[$__rate_interval])"
                " / on (cluster, job, instance, device, port) (node_infiniband_rate_bytes_per_second{@} > 0))",
                f"{PORT} {way}",
            )
            for way in ("received", "transmitted")
        ],
    ),
    Panel(
        "Bytes",
        "What ports received and sent, whoever did it.",
        "binBps",
        [
            Query(f"sum(rate(node_infiniband_port_data_{way}_bytes_total{{@}}[$__rate_interval]))", way)
            for way in ("received", "transmitted")
        ],
    ),
    Panel(
        "Ports",
        "Active, and usable by the verbs fabric.",
        "short",
        [
            Query("count(node_infiniband_state_id{@} == 4)", "active"),
            Query("count(node_infiniband_state_id{@} != 4)", "not active"),
            Query("sum(peermem_nic_works{@})", "usable"),
        ],
        alerts=["PeermemNicPortDown", "PeermemNicUnusable"],
    ),
    Panel(
        "Errors of ports",
        "A second: errors and discards, links that went down, and waiting to send.",
        "ops",
        [
            Query(f"topk(5, rate(node_infiniband_{name}_total{{@}}[$__rate_interval]) > 0)", f"{PORT} {name}")
            for name in ("port_errors_received", "port_discards_transmitted", "link_downed")
        ],
        alerts=["PeermemNicPortDown", "PeermemRailsFlapping"],
    ),
    Panel(
        "What else drivers count",
        "The fastest of the counters that a NIC's driver has of its own: retries, out of sequence, congestion.",
        "ops",
        [Query("topk(10, rate(peermem_nic_events_total{@}[$__rate_interval]) > 0)", f"{PORT} {{{{counter}}}}")],
        alerts=["PeermemRemoteAccessErrors"],
    ),
    Panel(
        "Rails",
        "Rails that are set aside now; links, rails and slices that broke, a second.",
        "short",
        [
            Query("sum by (fabric) (peermem_rails_down{@})", "{{fabric}} set aside"),
            Query(
                "sum by (fabric, what) (rate(peermem_fabric_failures_total{@}[$__rate_interval]))",
                "{{fabric}} {{what}} broke",
            ),
        ],
        alerts=["PeermemRailsDown", "PeermemRailsFlapping"],
    ),
    Panel(
        "Links",
        "Open links to other nodes, by fabric and by who opened them.",
        "short",
        [Query("sum by (fabric, side) (peermem_links{@})", "{{fabric}} {{side}}")],
    ),
    Panel(
        "Verbs objects",
        "Memory regions, windows, queue pairs and the like.",
        "short",
        [Query("sum by (kind) (peermem_verbs_objects{@})", "{{kind}}")],
        alerts=["PeermemVerbsObjectsGrow"],
    ),
    Panel(
        "Pinned memory",
        "What daemons hold pinned for NICs, and the lowest limit on it.",
        "bytes",
        [
            Query("sum(peermem_pinned_memory_bytes{@})", "pinned"),
            Query("min(peermem_pinned_memory_limit_bytes{@})", "lowest limit"),
        ],
        alerts=["PeermemPinnedMemoryShort"],
    ),
]

SECURITY = [
    Panel(
        "Denials",
        "What the policy denied, a second.",
        "ops",
        [Query("sum by (reason) (rate(peermem_authorization_denials_total{@}[$__rate_interval]))", "{{reason}}")],
        Kind.STACK,
        alerts=["PeermemDeniedAttempts"],
    ),
    Panel(
        "Strangers",
        "Calls without a good identity or a right, and connections without a good secret, a second.",
        "ops",
        [
            Query(
                "sum by (grpc_code) (rate(grpc_server_handled_total{@, "
                'grpc_code=~"UNAUTHENTICATED|PERMISSION_DENIED"}[$__rate_interval]))',
                "{{grpc_code}}",
            ),
            Query(
                "sum by (fabric) (rate(peermem_fabric_connections_rejected_total{@}[$__rate_interval]))",
                "{{fabric}} connections",
            ),
        ],
        Kind.STACK,
        alerts=["PeermemStrangers"],
    ),
    Panel(
        "Refused by limits",
        "What limits of tenants refused, a second.",
        "ops",
        [Query("sum by (resource) (rate(peermem_quota_rejections_total{@}[$__rate_interval]))", "{{resource}}")],
        Kind.STACK,
        alerts=["PeermemQuotaRefusals"],
    ),
    Panel(
        "Remote accesses that NICs refused",
        "A second; somebody used a key that does not, or no longer, allow it.",
        "ops",
        [
            Query(
                "sum by (instance, counter) (rate(peermem_nic_events_total"
                '{@, counter=~"resp_remote_access_errors|req_remote_access_errors"}[$__rate_interval]))',
                "{{instance}} {{counter}}",
            )
        ],
        alerts=["PeermemRemoteAccessErrors"],
    ),
    Panel(
        "Age of the policy",
        "How long ago the policy in force was loaded: nodes should agree. Refused files are counted beside.",
        "s",
        [
            Query("time() - min(peermem_policy_loaded_timestamp_seconds{@})", "oldest"),
            Query("time() - max(peermem_policy_loaded_timestamp_seconds{@})", "newest"),
        ],
        alerts=["PeermemPolicyRefused"],
    ),
    Panel(
        "Policy files and audit lines that failed",
        "Nodes whose policy file is refused; refused files and lost audit lines, a second.",
        "short",
        [
            Query("sum(peermem_policy_refused{@})", "nodes with a refused file"),
            Query("sum(rate(peermem_policy_reload_failures_total{@}[$__rate_interval]))", "refused files"),
            Query("sum(rate(peermem_audit_failures_total{@}[$__rate_interval]))", "lost audit lines"),
        ],
        alerts=["PeermemPolicyRefused", "PeermemAuditFails"],
    ),
    Panel(
        "Certificates",
        "Time until the first ends: the one that a node shows, and the first of the authorities that it believes.",
        "s",
        [
            Query(
                "min by (certificate) (peermem_tls_certificate_expiry_timestamp_seconds{@}) - time()",
                "{{certificate}}",
            )
        ],
        alerts=["PeermemCertificateExpires"],
    ),
]

CONTROL = [
    Panel(
        "Lag of the event loop",
        "How late 1 in 100 timers ran. Calls, leases and links wait as long.",
        "s",
        [
            Query(
                "topk(10, histogram_quantile(0.99, sum by (instance, le) "
                "(rate(peermem_event_loop_lag_seconds_bucket{@}[$__rate_interval]))))",
                NODE,
            )
        ],
        alerts=["PeermemEventLoopSlow"],
    ),
    Panel(
        "Calls",
        "gRPC calls a second, by method.",
        "ops",
        [Query("sum by (grpc_method) (rate(grpc_server_handled_total{@}[$__rate_interval])) > 0", "{{grpc_method}}")],
        Kind.STACK,
    ),
    Panel(
        "Calls that failed",
        "A second, by code. NOT_FOUND and the like are the caller's; INTERNAL is a defect.",
        "ops",
        [
            Query(
                'sum by (grpc_code) (rate(grpc_server_handled_total{@, grpc_code!="OK"}[$__rate_interval])) > 0',
                "{{grpc_code}}",
            )
        ],
        Kind.STACK,
        alerts=["PeermemInternalErrors"],
    ),
    Panel(
        "Duration of calls",
        "What 1 in 100 unary calls takes longer than.",
        "s",
        [
            Query(
                "topk(10, histogram_quantile(0.99, sum by (grpc_method, le) (rate(grpc_server_handling_seconds_bucket"
                '{@, grpc_type="unary"}[$__rate_interval]))))',
                "{{grpc_method}}",
            )
        ],
    ),
    Panel(
        "Requests that came again",
        "A second: answered with what the first one had made.",
        "ops",
        [Query("sum by (resource) (rate(peermem_idempotent_replays_total{@}[$__rate_interval]))", "{{resource}}")],
    ),
    Panel(
        "CPU",
        "Cores that the daemons take.",
        "short",
        [Query("topk(10, rate(process_cpu_seconds_total{@}[$__rate_interval]))", NODE)],
    ),
    Panel(
        "Memory of the daemons",
        "Their own, without regions and buffers; and all that is resident.",
        "bytes",
        [
            Query("topk(5, peermem_private_memory_bytes{@})", f"{NODE} own"),
            Query("topk(5, process_resident_memory_bytes{@})", f"{NODE} resident"),
        ],
        alerts=["PeermemMemoryGrows"],
    ),
    Panel(
        "Open files",
        "As a share of what a daemon may have open.",
        "percentunit",
        [
            Query(
                "topk(10, process_open_fds{@} / on (cluster, job, instance) process_max_fds{@})",
                NODE,
            )
        ],
        alerts=["PeermemFilesNearLimit", "PeermemFilesGrow"],
    ),
    Panel(
        "Directory",
        "Daemons that reach it and that do not, and the nodes that it knows: the fewest that any daemon sees.",
        "short",
        [
            Query("sum by (kind) (peermem_directory_connected{@})", "reach {{kind}}"),
            Query("count by (kind) (peermem_directory_connected{@} == 0)", "don't reach {{kind}}"),
            Query("min(peermem_directory_nodes{@})", "nodes"),
        ],
        alerts=["PeermemDirectoryAway", "PeermemNodeNameTaken", "PeermemDirectoryLeaseLost"],
    ),
]
