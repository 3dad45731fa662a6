"""The configuration: defaults, the file, the variables, and a sentence for everything that is wrong."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from peermem.config import Address, Config, DeviceSize, ListenAddress, Memfd, Name, load, node_name
from peermem.config_values import CollectorUrl, HostName
from tests.configs import problems, write

SHIPPED = Path(__file__).parents[1] / "deploy" / "peermem.toml"


def every_key(table: dict[str, object], path: str = "") -> set[str]:
    keys = set()
    for key, value in table.items():
        keys |= every_key(value, f"{path}{key}.") if isinstance(value, dict) else {path + key}
    return keys


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, ""), {})
    assert config == Config()
    assert config.grpc.address == "127.0.0.1:7470"
    assert config.grpc.max_message == 4 << 20
    assert config.transfer.grant_ttl == 30.0
    assert config.devices == (Memfd(Name("memfd0"), DeviceSize(1 << 30)),)


def test_the_shipped_file_shows_every_option_with_its_default() -> None:
    assert load(SHIPPED, {}) == Config()
    shown = every_key(tomllib.loads(SHIPPED.read_text())) | {"node"}
    known = every_key(msgspec.to_builtins(Config(), enc_hook=str))
    assert known - shown == set()


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Config().grpc.reflection = True  # type: ignore[misc]


def test_a_file_is_read(tmp_path: Path) -> None:
    config = load(
        write(
            tmp_path,
            """
            node = "a"
            insecure_network = true
            grpc.socket = ""
            grpc.address = "[::]:0"
            grpc.advertise = "gpu-01.rack1:7470"
            tcp.rails = 16
            transfer.grant_ttl = "1.5s"
            attach.adopt_limit = 0
            log = { level = "debug", format = "json" }
            [[device]]
            name = "bar0"
            size = 4096
            [[device]]
            name = "bar1"
            size = "1.5GiB"
            [directory.nodes]
            b = "10.0.0.2:7470"
            """,
        ),
        {},
    )
    assert (config.node, config.grpc.socket, config.grpc.advertise) == ("a", None, "gpu-01.rack1:7470")
    assert (config.grpc.address, config.tcp.rails, config.transfer.grant_ttl) == ("[::]:0", 16, 1.5)
    assert (config.attach.adopt_limit, config.log.level, config.log.format) == (0, "debug", "json")
    assert config.devices == tuple(
        Memfd(Name(name), DeviceSize(size)) for name, size in (("bar0", 4096), ("bar1", 3 << 29))
    )
    assert config.directory.nodes == {"b": "10.0.0.2:7470"}


def test_a_variable_wins_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'node = "a"\ngrpc.address = "127.0.0.1:1"\ngrpc.reflection = false\n')
    config = load(
        file,
        {
            "PATH": "/bin",
            "PEERMEM_TARGET": "unix:///elsewhere",
            "PEERMEM_CLIENT_CA": "/ca.pem",
            "PEERMEM_NODE": "b",
            "PEERMEM_GRPC_ADDRESS": "127.0.0.1:0",
            "PEERMEM_GRPC_REFLECTION": "true",
            "PEERMEM_HTTP_ADDRESS": "",
            "PEERMEM_TCP_RAILS": "4",
            "PEERMEM_TRANSFER_GRANT_TTL": "2min",
            "PEERMEM_ATTACH_ADOPT_LIMIT": "4096",
            "PEERMEM_P2PMEM": "false",
            "PEERMEM_FABRIC": "tcp",
            "PEERMEM_VERBS_NICS": '["rxe0/1"]',
            "PEERMEM_VERBS_MTU": "1024",
            "PEERMEM_VERBS_ACK_TIMEOUT": "1s",
            "PEERMEM_DEVICE": '[{name = "m", size = "64MiB"}]',
            "PEERMEM_DIRECTORY_NODES": '{c = "10.0.0.3:7470"}',
        },
    )
    assert (config.node, config.grpc.address, config.grpc.reflection) == ("b", "127.0.0.1:0", True)
    assert (config.http.address, config.tcp.rails, config.transfer.grant_ttl) == (None, 4, 120.0)
    assert (config.attach.adopt_limit, config.devices) == (4096, (Memfd(Name("m"), DeviceSize("64MiB")),))
    assert config.directory.nodes == {"c": "10.0.0.3:7470"}
    assert (config.p2pmem, config.fabric) == (False, "tcp")
    assert (config.verbs.nics, config.verbs.mtu, config.verbs.ack_timeout) == (("rxe0/1",), 1024, 1.0)


HOST_PORT = 'host:port with a port from 1 to 65535, such as "10.0.0.2:7470" or "[fd00::2]:7470"'
LISTEN = 'host:port with a port from 0 to 65535, such as "127.0.0.1:7470" or "[::1]:7470"'
NAME = "1 to 63 of a-z, 0-9 and -, starting with a letter and not ending with -"
TTL = 'a duration with its unit (ms, s, min, h, d) from 100ms to 1h, such as "30s"'
MESSAGE = 'a size from 64KiB to 1GiB in bytes, KiB, MiB, GiB or TiB, such as "64MiB"'
BAR = "kind = 'pci_resource', name = 'a', address = '0000:41:00.0'"
VFIO = BAR.replace("pci_resource", "vfio")
LATER = "offset = '4MiB', size = '4KiB'"
OTHER = BAR.replace("'a'", "'b'")
GPU, OTHER_GPU = BAR.replace("pci_resource", "cuda"), OTHER.replace("pci_resource", "rocm")
UNITS = 'in bytes, KiB, MiB, GiB or TiB, such as "64MiB"'
NIC = 'an RDMA device or one of its ports, such as "mlx5_0" or "mlx5_0/1"'
PATH = "an absolute path of at most 107 bytes, or empty for none"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nodes = 1", "nodes is no option; the nearest is node"),
        ("[grpc]\nadress = 1", "grpc.adress is no option; the nearest is grpc.address"),
        ("[[device]]\nname = 'a'\nsize = 4096\nsiz = 1", "device[0].siz is no option; the nearest is device[0].size"),
        ("node = 'A_1'", f"node is 'A_1': expected {NAME}"),
        ("node = 7", f"node is 7: expected {NAME}"),
        ("grpc = 7", "grpc is 7: expected a table"),
        ("device = 7", "device is 7: expected a list of tables"),
        ("device = [7]", "device[0] is 7: expected a table"),
        ("device = [{name = 'a'}]", 'device[0].size is missing: expected a size from 4KiB to 1024TiB in bytes, KiB, '
         'MiB, GiB or TiB, such as "64MiB"'),
        ("device = [{name = 'a', size = 4096, kind = 'gpu'}]", "device[0].kind is 'gpu': expected one of \"memfd\", "
         '"pci_resource", "cuda", "rocm", "udmabuf", "vfio"'),
        ("device = [{name = 'a', size = 4096, kind = []}]", "device[0].kind is []: expected one of \"memfd\", "
         '"pci_resource", "cuda", "rocm", "udmabuf", "vfio"'),
        (f"device = [{{{GPU}}}]", f"device[0].size is missing: expected a size from 4KiB to 1024TiB {UNITS}"),
        (f"device = [{{{GPU}, size = 4096, adopt = 1}}]", "device[0].adopt is 1: expected true or false"),
        ("device = [{name = 'a', size = 4096, bar = 1}]", "device[0].bar is no option; the nearest is device[0].name"),
        (f"device = [{{{BAR}, bar = 6}}]", "device[0].bar is 6: expected a whole number from 0 to 5"),
        (f"device = [{{{BAR}}}]", "device[0].bar is missing: expected a whole number from 0 to 5"),
        (f"device = [{{{BAR}, bar = 2, offset = 512}}]", "device[0].offset is 512: expected a size from 0B to 1024TiB "
         f"{UNITS}, in whole pages of 4096 bytes"),
        (f"device = [{{{BAR}, bar = 2, size = '5000B'}}]", "device[0].size is '5000B': expected a size from 4KiB to "
         f"1024TiB {UNITS}, in whole pages of 4096 bytes, or empty for none"),
        (f"device = [{{{BAR.replace('41:', '')}, bar = 2}}]", "device[0].address is '0000:00.0': expected a PCI "
         'address, such as "0000:41:00.0"'),
        ("p2pmem = 'yes'", "p2pmem is 'yes': expected true or false"),
        ("fabric = 'rdma'", 'fabric is \'rdma\': expected one of "auto", "verbs", "tcp"'),
        ("verbs.nics = 'mlx5_0'", f"verbs.nics is 'mlx5_0': expected a list, each {NIC}"),
        ("verbs.nics = ['mlx5_0', 'mlx5_1/0']", f"verbs.nics[1] is 'mlx5_1/0': expected {NIC}"),
        ("verbs.nics = [7]", f"verbs.nics[0] is 7: expected {NIC}"),
        ("verbs.mtu = 1500", "verbs.mtu is 1500: expected one of 0, 256, 512, 1024, 2048, 4096"),
        ("verbs.mtu = true", "verbs.mtu is True: expected one of 0, 256, 512, 1024, 2048, 4096"),
        ("verbs.retries = 7", "verbs.retries is 7: expected a whole number from 1 to 6"),
        ("verbs.gid_index = -2", "verbs.gid_index is -2: expected a whole number from -1 to 65535"),
        ("verbs.ack_timeout = '10us'", "verbs.ack_timeout is '10us': expected a duration with its unit (ms, s, min, h, "
         'd) from 1ms to 60s, such as "30s"'),
        ("grpc.reflection = 1", "grpc.reflection is 1: expected true or false"),
        ("grpc.max_message = '4MB'", f"grpc.max_message is '4MB': expected {MESSAGE}"),
        ("grpc.max_message = '0.3B'", f"grpc.max_message is '0.3B': expected {MESSAGE}"),
        ("grpc.max_message = -1", f"grpc.max_message is -1: expected {MESSAGE}"),
        ("grpc.max_message = true", f"grpc.max_message is True: expected {MESSAGE}"),
        ("grpc.max_message = '2GiB'", f"grpc.max_message is '2GiB': expected {MESSAGE}"),
        ("transfer.grant_ttl = 30", f"transfer.grant_ttl is 30: expected {TTL}"),
        ("transfer.grant_ttl = '30'", f"transfer.grant_ttl is '30': expected {TTL}"),
        ("transfer.grant_ttl = '30sec'", f"transfer.grant_ttl is '30sec': expected {TTL}"),
        ("transfer.grant_ttl = '2h'", f"transfer.grant_ttl is '2h': expected {TTL}"),
        ("tcp.rails = 17", "tcp.rails is 17: expected a whole number from 1 to 16"),
        ("tcp.rails = 2.0", "tcp.rails is 2.0: expected a whole number from 1 to 16"),
        ("tcp.rails = true", "tcp.rails is True: expected a whole number from 1 to 16"),
        ("tcp.address = ''", f"tcp.address is '': expected {LISTEN}"),
        ("tcp.address = 5", f"tcp.address is 5: expected {LISTEN}"),
        ("http.address = '127.0.0.1'", f"http.address is '127.0.0.1': expected {LISTEN}, or empty for none"),
        (
            "tracing.endpoint = 'collector'",
            f"tracing.endpoint is 'collector': expected {CollectorUrl.expected}, or empty for none",
        ),
        ("tracing.sample = 1.5", "tracing.sample is 1.5: expected a number from 0.0 to 1.0"),
        ("tracing.sample = true", "tracing.sample is True: expected a number from 0.0 to 1.0"),
        ("http.page = 'on'", "http.page is 'on': expected one of \"loopback\", \"everyone\", \"off\""),
        ("http.names = ['GPU-01']", f"http.names[0] is 'GPU-01': expected {HostName.expected}"),
        ("http.address = '::1:80'", f"http.address is '::1:80': expected {LISTEN}, or empty for none"),
        ("tcp.advertise = 'a:0'", f"tcp.advertise is 'a:0': expected {HOST_PORT}, or empty for none"),
        ("grpc.socket = 'run/x'", f"grpc.socket is 'run/x': expected {PATH}"),
        ("directory.nodes.b = 'b'", f"directory.nodes.b is 'b': expected {HOST_PORT}"),
        ("directory.nodes.b = 7", f"directory.nodes.b is 7: expected {HOST_PORT}"),
        ("directory.nodes.B = 'b:1'", f"directory.nodes key is 'B': expected {NAME}"),
        ("directory.nodes = 7", "directory.nodes is 7: expected a table"),
        ("directory.kind = 'dns'", "directory.kind is 'dns': expected one of \"static\", \"etcd\""),
        ("log.level = 'loud'", 'log.level is \'loud\': expected one of "debug", "info", "warning", "error"'),
        ("log.level = 2000-01-01", 'log.level is datetime.date(2000, 1, 1): expected one of "debug", "info", '
         '"warning", "error"'),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_file_key_and_what_was_expected(
    tmp_path: Path, text: str, problem: str
) -> None:
    file = write(tmp_path, text)
    assert problems(file) == [f"{file}: {problem}."]


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        ("PEERMEM_GRPC_ADRESS", "x", "environment: PEERMEM_GRPC_ADRESS is no option; the nearest is "
         "PEERMEM_GRPC_ADDRESS."),
        ("PEERMEM_GRPC", "{}", "environment: PEERMEM_GRPC is no option; the nearest is PEERMEM_GRPC_SOCKET."),
        ("PEERMEM_NODE", "A", f"PEERMEM_NODE: node is 'A': expected {NAME}."),
        ("PEERMEM_VERBS_MTU", "9000", "PEERMEM_VERBS_MTU: verbs.mtu is 9000: expected one of 0, 256, 512, 1024, 2048, "
         "4096."),
        ("PEERMEM_TCP_RAILS", "", "PEERMEM_TCP_RAILS: tcp.rails is '': expected a whole number from 1 to 16."),
        ("PEERMEM_TCP_RAILS", "1\nx = 2", "PEERMEM_TCP_RAILS: tcp.rails is '1\\nx = 2': expected a whole number "
         "from 1 to 16."),
        ("PEERMEM_DEVICE", '[{name = "M", size = "1GiB"}]', f"PEERMEM_DEVICE: device[0].name is 'M': expected {NAME}."),
        ("PEERMEM_DIRECTORY_NODES", '{b = "b"}', f"PEERMEM_DIRECTORY_NODES: directory.nodes.b is 'b': expected "
         f"{HOST_PORT}."),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_refused_by_its_name(tmp_path: Path, variable: str, text: str, problem: str) -> None:
    assert problems(write(tmp_path, ""), {variable: text}) == [problem]


@pytest.mark.parametrize(
    ("text", "where"),
    [("a = 1\nb = \n", "line 2, column 5"), ("[grpc", "end of document"), ("a = 1\na = 2\n", "line 2, column 6")],
)
def test_broken_toml_is_refused_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    file = write(tmp_path, text)
    (problem,) = problems(file)
    assert problem.startswith(f"{file}: ")
    assert ": this is not TOML: " in problem
    assert where in problem


def test_a_missing_file_is_refused_only_when_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "none.toml"
    assert problems(missing) == [f"{missing}: there is no such file. Write it, or leave --config out."]
    monkeypatch.setattr("peermem.config.DEFAULT_PATH", missing)
    assert load(None, {}) == Config()


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path}: it can't be read: Is a directory."]
    file = tmp_path / "latin"
    file.write_bytes(b'node = "\xff"')
    assert problems(file) == [f"{file}: it is not UTF-8 text, from byte 8 on."]


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "node = 7\n[tcp]\nrails = 0\nrail = 1\n")
    found = problems(file, {"PEERMEM_LOG_LEVEL": "loud", "PEERMEM_X": "1"})
    assert len(found) == 5
    assert all(problem.endswith(".") for problem in found)


@pytest.mark.parametrize("section", ["grpc", "tcp", "http"])
@pytest.mark.parametrize("address", ["10.0.0.1:7470", "[fd00::1]:7470", "gpu-01:7470"])
def test_an_address_that_strangers_reach_needs_insecure_network(tmp_path: Path, section: str, address: str) -> None:
    file = write(tmp_path, f'{section}.address = "{address}"')
    (problem,) = problems(file)
    assert problem.startswith(f"{file}: {section}.address {address} can be reached from other hosts")
    assert "without TLS whoever reaches it can read, write and delete everything" in problem
    assert "insecure_network = true" in problem
    load(file, {"PEERMEM_INSECURE_NETWORK": "true"})


def test_a_variable_is_named_when_it_contradicts(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, ""), {"PEERMEM_GRPC_ADDRESS": "10.0.0.1:1"})
    assert problem.startswith("PEERMEM_GRPC_ADDRESS: grpc.address 10.0.0.1:1 can be reached")


@pytest.mark.parametrize("address", ["127.0.0.1:7470", "127.9.9.9:0", "[::1]:7470", "localhost:7470"])
def test_a_loopback_address_is_served_as_it_is(tmp_path: Path, address: str) -> None:
    assert load(write(tmp_path, f'grpc.address = "{address}"'), {}).grpc.address == address


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("grpc = {socket = '', address = ''}", "grpc"),
        ("grpc.socket = '/x'\nattach.socket = '/x'", "attach.socket"),
        ("device = [{name = 'a', size = 4096}, {name = 'a', size = 8192}]", "device"),
        ("device = [{name = 'adopted', size = 4096}]", "device"),
        ("device = [{name = 'p2pmem-0000-41-00-0', size = 4096}]", "device"),
        (f"device = [{{{BAR}, bar = 2}}, {{{OTHER}, bar = 2, offset = '1GiB'}}]", "device"),
        (f"device = [{{{GPU}, size = 4096}}, {{{OTHER_GPU}, size = 4096}}]", "device"),
        ("device = [{name = 'adopted-dmabuf', size = 4096}]", "device"),
        (f"device = [{{{VFIO}, bar = 2}}, {{{OTHER}, bar = 0}}]", "device"),
        (f"device = [{{{VFIO}, bar = 2, ranges = [{{{LATER}}}, {{offset = 0, size = '4100KiB'}}]}}]", "device"),
        ("insecure_network = true\ngrpc.address = '0.0.0.0:7470'", "grpc.advertise"),
        ("insecure_network = true\ntcp.address = '[::]:7471'", "tcp.advertise"),
    ],
)
def test_values_that_contradict_each_other_are_refused(tmp_path: Path, text: str, key: str) -> None:
    file = write(tmp_path, text)
    (problem,) = problems(file)
    assert problem.startswith(f"{file}: {key}")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("gpu-01.rack1.example.com", "gpu-01"),
        ("GPU_01", "gpu-01"),
        ("10", "node-10"),
        ("", "node"),
        ("-é-", "node"),
        ("x" * 80, "x" * 63),
        ("a" * 62 + "-b", "a" * 62),
    ],
)
def test_a_host_name_becomes_a_node_name(host: str, name: str) -> None:
    assert node_name(host) == name


@pytest.mark.parametrize(
    "text",
    ["", "a", ":1", "a:", "a:1:2", "a b:1", "-a:1", "a:65536", "a:01", "a:+1", "1.2.3:1", "256.1.1.1:1", "[::1]",
     "[a]:1", "[1.2.3.4]:1", "a:²", "a/b:1", "unix:/x:1"],
)  # fmt: skip
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="host:port with"):
        ListenAddress(text)


def test_the_parts_of_an_address() -> None:
    assert (Address("[fd00::2]:7470").host, Address("[fd00::2]:7470").port) == ("fd00::2", 7470)
    assert (Address("node-b.x:1").host, ListenAddress("127.0.0.1:0").port) == ("node-b.x", 0)


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("", True),
        ("policy.without_file = 'own'", False),
        ("grpc.address = ''", True),
        ("grpc.address = 'localhost:0'", True),
        ("insecure_network = true\ngrpc.address = '10.0.0.1:7470'", False),
        ("insecure_network = true\ngrpc.address = '10.0.0.1:7470'\npolicy.without_file = 'open'", True),
    ],
)
def test_without_a_policy_only_who_is_not_reached_is_open(tmp_path: Path, text: str, is_open: bool) -> None:
    assert load(write(tmp_path, text), {}).is_open_without_policy is is_open
