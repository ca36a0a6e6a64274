"""Keys, roles and the list of clients, on real sockets."""

import asyncio
import json
import os
import select
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from tests.waiting import until
from tta import protocol
from tta.auth import Clients, _zap
from tta.client import AsyncClient, Client, Prediction
from tta.config import load_config
from tta.connection import connect
from tta.errors import Code, ConfigError, DeniedError, OverloadedError, TTAError, UnauthenticatedError
from tta.keys import ROLES, Credentials, read_key_pair, write_key_pair
from tta.scenario import DaemonProcess

PEOPLE = {"camera": ["predict"], "annotator": ["label"], "operator": ["admin"], "guest": []}
IMAGE = np.zeros((1, 32, 32, 3), np.uint8)
# Which roles may; `admin` everywhere, and an empty list means any key on the list.
ON_DATA: dict[type[protocol.Request], set[str]] = {
    protocol.Predict: {"predict"},
    protocol.Cancel: {"predict"},
    protocol.Metadata: set(),
    protocol.Ready: set(),
}
ON_CONTROL: dict[type[protocol.Request], set[str]] = {
    protocol.Label: {"label"},
    protocol.Ask: {"label"},
    protocol.Status: set(),
    protocol.Versions: set(),
    protocol.Metadata: set(),
    protocol.Ready: set(),
    **{
        each: {"admin"}
        for each in (
            protocol.Pause,
            protocol.Resume,
            protocol.Adapt,
            protocol.Approve,
            protocol.Accept,
            protocol.Deploy,
            protocol.Erase,
            protocol.Rollback,
            protocol.Reset,
        )
    },
}
NEEDED: dict[type[protocol.Request], dict[str, Any]] = {  # fields without a default
    protocol.Predict: {"dtype": "uint8", "shape": list(IMAGE.shape)},
    protocol.Deploy: {"bundle": "/none.tta"},
}


@dataclass
class Guarded:
    """A daemon that asks for keys, and the key pairs of everybody."""

    daemon: DaemonProcess
    keys: Path
    clients: Path

    def credentials(self, name: str) -> Credentials:
        """Of one of the people, listed or not."""
        return Credentials.read(self.keys / f"{name}.key_secret", self.keys / "daemon.key")

    def client(self, name: str | None, timeout_s: float = 20.0) -> Client:
        """A client with somebody's key; None: without any."""
        credentials = None if name is None else self.credentials(name)
        return Client(self.daemon.endpoint, self.daemon.control, timeout_s, credentials=credentials)

    def allow(self, people: dict[str, list[str]]) -> None:
        """Write the list anew and wait until both processes have read it."""
        listed = {
            name: {"key": read_key_pair(self.keys / f"{name}.key_secret").public.decode(), "roles": roles}
            for name, roles in people.items()
        }
        fresh = self.clients.with_suffix(".new")
        fresh.write_text(json.dumps(listed))  # JSON is YAML
        self.put(fresh)

    def put(self, fresh: Path) -> None:
        """Put a file in the place of the list, and wait until it has been looked at."""
        log = self.daemon.log_path
        before = log.read_text().count("client_list_") if log.exists() else 0
        fresh.rename(self.clients)
        if self.daemon.process is not None:
            until(lambda: log.read_text().count("client_list_") >= before + 2, "both processes' look at the list")


@pytest.fixture(scope="module")
def guarded(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A running daemon with the people of `PEOPLE` on its list; "stranger" is on none."""
    folder = tmp_path_factory.mktemp("guarded")
    keys, clients = folder / "keys", folder / "clients.yaml"
    for name in ("daemon", "stranger", *PEOPLE):
        write_key_pair(keys, name)
    credentials = Credentials.read(keys / "operator.key_secret", keys / "daemon.key")
    settings = {"security.key": str(keys / "daemon.key_secret"), "security.clients": str(clients)}
    daemon = DaemonProcess(bundle_path, folder / "daemon", settings, credentials=credentials)
    found = Guarded(daemon, keys, clients)
    found.allow(PEOPLE)
    daemon.start()
    yield found
    daemon.stop()


def ask(guarded: Guarded, name: str, endpoint: str, request: protocol.Request) -> Code:
    """The code a request is answered with."""
    context = zmq.Context()
    socket = connect(context, endpoint, 20.0, queue=True, credentials=guarded.credentials(name))
    images = (IMAGE,) if isinstance(request, protocol.Predict) else ()
    try:
        socket.send_multipart(protocol.encode(request, *images))
        assert socket.poll(20_000), f"no answer to {request}"
        return Code(protocol.decode_reply(socket.recv_multipart())[0]["code"])
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("name", PEOPLE)
def test_every_operation_asks_for_its_role(guarded: Guarded, name: str) -> None:
    """Each operation of both sockets is denied to whoever lacks its role, and not to who has it."""
    for endpoint, operations in ((guarded.daemon.endpoint, ON_DATA), (guarded.daemon.control, ON_CONTROL)):
        for operation, roles in operations.items():
            has = set(PEOPLE[name])
            may = not roles or bool(roles & has) or "admin" in has
            code = ask(guarded, name, endpoint, operation(id=1, **NEEDED.get(operation, {})))
            assert (code != Code.PERMISSION_DENIED) == may, (operation.__name__, code)
            assert code != Code.UNAUTHENTICATED


def test_the_table_of_operations_is_whole() -> None:
    """No operation of the protocol is missing from the table that the test above goes through."""
    for union, table in ((protocol.DataRequest, ON_DATA), (protocol.ControlRequest, ON_CONTROL)):
        assert set(union.__args__) == set(table)


@pytest.mark.parametrize("who", ["stranger", None, "wrong server key"])
def test_nobody_gets_in_without_the_right_keys(guarded: Guarded, who: str | None) -> None:
    """A key not on the list, no key, and another server key than the daemon's are refused on both sockets."""
    for call in (
        lambda c: c.predict(IMAGE),
        lambda c: c.ready(),
        lambda c: c.status(),
        lambda c: c.label([1], [1]),
    ):
        if who == "wrong server key":
            own = guarded.credentials("operator")
            credentials = Credentials(own.key, own.key.public)
            client = Client(guarded.daemon.endpoint, guarded.daemon.control, 3.0, credentials=credentials)
        else:
            client = guarded.client(who, 3.0)
        with client, pytest.raises(UnauthenticatedError, match="key"):
            call(client)


def test_a_daemon_without_keys_says_so(start_daemon: Callable[..., DaemonProcess], tmp_path: Path) -> None:
    """A client that brings a key to a daemon which asks for none is told, not left waiting."""
    daemon = start_daemon()
    _, secret = write_key_pair(tmp_path, "somebody")
    credentials = Credentials.read(secret, tmp_path / "somebody.key")
    with (
        Client(daemon.endpoint, daemon.control, 20.0, credentials=credentials) as client,
        pytest.raises(UnauthenticatedError, match="takes no keys"),
    ):
        client.status()


def test_the_asyncio_client_is_refused_too(guarded: Guarded) -> None:
    """AsyncClient raises the same error on both sockets."""

    async def go() -> None:
        async with AsyncClient(
            guarded.daemon.endpoint, guarded.daemon.control, 20.0, credentials=guarded.credentials("stranger")
        ) as client:
            for call in (client.ready, client.status):
                with pytest.raises(UnauthenticatedError):
                    await call()

    asyncio.run(go())


def test_the_list_is_read_again_while_it_runs(guarded: Guarded) -> None:
    """A key off the list is refused on its open connection, one added gets in, a broken list changes nothing."""
    with guarded.client("camera") as camera:
        assert camera.ready()
        guarded.allow({"operator": ["admin"], "stranger": ["predict"]})

        with pytest.raises(DeniedError, match="list of clients"):
            camera.ready()
        with guarded.client("stranger") as stranger:
            assert stranger.ready()
        broken = guarded.clients.with_suffix(".broken")
        broken.write_text("operator: {key: nonsense}")
        guarded.put(broken)
        assert guarded.daemon.log_path.read_text().count("client_list_refused") == 2
        with guarded.client("operator") as operator:
            assert operator.status()["state"] == "stable"
        guarded.allow(PEOPLE)
        until(lambda: _works(camera), "the list as it was")


def test_a_refused_client_gets_in_once_it_is_listed(guarded: Guarded) -> None:
    """Both clients knock again: the object that was refused works on both sockets when its key has been added."""

    async def go() -> None:
        async with AsyncClient(
            guarded.daemon.endpoint, guarded.daemon.control, 20.0, credentials=guarded.credentials("stranger")
        ) as other:
            for call in (client.ready, client.status):
                with pytest.raises(UnauthenticatedError):
                    call()
            for call in (other.ready, other.status):
                with pytest.raises(UnauthenticatedError):
                    await call()
            guarded.allow({**PEOPLE, "stranger": ["predict"]})
            until(lambda: _works(client), "the sockets of the blocking client")
            assert client.status()["state"] == "stable"
            end = asyncio.get_running_loop().time() + 20
            while asyncio.get_running_loop().time() < end:
                try:
                    if await other.ready() and (await other.status())["state"] == "stable":
                        break
                except UnauthenticatedError:
                    await asyncio.sleep(0.05)
            else:
                raise AssertionError("the asyncio client was not let in")

    with guarded.client("stranger") as client:
        asyncio.run(go())
    guarded.allow(PEOPLE)


def test_a_refusal_is_not_missed_on_a_busy_machine(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose thread is held up before it listens for events hears of a refusal all the same."""
    listen = zmq.Socket.monitor

    def held_up(self: zmq.Socket, *arguments: Any) -> None:
        select.select([], [], [], 0.2)  # the kernel has other things to do
        listen(self, *arguments)

    monkeypatch.setattr(zmq.Socket, "monitor", held_up)
    for who, reason in (("stranger", "does not know this client's key"), (None, "asks for a key")):
        with guarded.client(who, 5.0) as client:
            for call in (client.status, client.ready):
                with pytest.raises(UnauthenticatedError, match=reason):
                    call()


def test_a_connection_that_is_refused_when_it_comes_back_says_so(guarded: Guarded) -> None:
    """A client whose key has gone from the list while the daemon was down is told why, on both clients."""

    async def go() -> None:
        async with AsyncClient(
            guarded.daemon.endpoint, guarded.daemon.control, 20.0, credentials=guarded.credentials("camera")
        ) as other:
            assert (await other.status())["state"] == camera.status()["state"]
            guarded.daemon.stop()
            listed = guarded.clients.read_text()
            guarded.clients.write_text(json.dumps({"operator": json.loads(listed)["operator"]}))
            guarded.daemon.start()
            for _ in range(2):
                with pytest.raises(UnauthenticatedError):
                    camera.status()
                with pytest.raises(UnauthenticatedError):
                    await other.status()
            guarded.clients.write_text(listed)
            guarded.daemon.stop()
            guarded.daemon.start()
            assert (await other.status())["state"] == camera.status()["state"]

    with guarded.client("camera") as camera:
        asyncio.run(go())


def test_the_largest_frame_is_the_same_with_keys(guarded: Guarded) -> None:
    """A frame of just `max_message_bytes` is answered over CURVE, which adds to it, on both sockets."""
    context = zmq.Context()
    try:
        for endpoint in (guarded.daemon.endpoint, guarded.daemon.control):
            socket = connect(context, endpoint, 20.0, True, guarded.credentials("camera"))
            socket.send_multipart(protocol.encode(protocol.Metadata(id=1)))
            assert socket.poll(20_000)
            n_bytes = protocol.decode_reply(socket.recv_multipart())[0]["max_message_bytes"]
            request = protocol.encode(protocol.Ready(id=2))
            socket.send_multipart([*request, bytes(n_bytes)])
            assert socket.poll(20_000), "no answer"
            assert protocol.decode_reply(socket.recv_multipart())[0]["id"] == 2
            socket.close()
    finally:
        context.destroy(linger=0)


def test_a_name_is_worth_something_beside_its_key_only(guarded: Guarded) -> None:
    """A request under another client's name and id is computed, not answered with what that client has asked."""
    context = zmq.Context()
    ids: list[int] = []
    sockets: list[zmq.Socket[bytes]] = []
    try:
        for who in ("camera", "operator", "camera"):
            socket = connect(context, guarded.daemon.endpoint, 20.0, True, guarded.credentials(who))
            sockets.append(socket)
            request = protocol.Predict(id=7, client="camera-7", dtype="uint8", shape=list(IMAGE.shape))
            socket.send_multipart(protocol.encode(request, IMAGE))
            assert socket.poll(20_000)
            ids.append(protocol.decode_reply(socket.recv_multipart())[0]["prediction_id"])
    finally:
        for socket in sockets:
            socket.close()
        context.destroy(linger=0)

    assert ids[0] != ids[1]
    assert ids[0] == ids[2]


def test_a_traceback_in_the_log_tells_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    """What the variables hold when something fails, keys among them, is not logged."""
    from tta import log

    def fail(secret: str) -> None:
        raise ValueError("it failed")

    logger = log.setup("test")
    try:
        fail("the-secret")
    except ValueError:
        logger.exception("failed")

    line = capsys.readouterr().err
    assert "it failed" in line
    assert '"name": "fail"' in line
    assert "the-secret" not in line


def _works(client: Client) -> bool:
    try:
        return client.ready()
    except TTAError:
        return False


def test_a_killed_server_asks_for_keys_again(guarded: Guarded) -> None:
    """After kill -9 the server's successor answers those on the list and turns strangers away."""
    with guarded.client("operator") as operator:
        first = operator.status()["processes"]["server"]["pid"]
        os.kill(first, 9)
        until(lambda: operator.status()["processes"]["server"]["pid"] not in (first, None), "another server")
        assert operator.ready()
    with guarded.client("stranger") as stranger, pytest.raises(UnauthenticatedError):
        stranger.ready()


def test_secrets_are_written_nowhere(guarded: Guarded) -> None:
    """Neither log nor state folder, status nor the processes' command lines hold a secret key."""
    secrets = [read_key_pair(path).secret for path in guarded.keys.glob("*.key_secret")]
    files = [p for p in guarded.daemon.folder.rglob("*") if p.is_file()]
    with guarded.client("operator") as operator:
        status = operator.status()
    seen = [json.dumps(status).encode(), *(p.read_bytes() for p in files)]
    seen += [Path(f"/proc/{p['pid']}/cmdline").read_bytes() for p in status["processes"].values() if p["pid"]]

    assert guarded.daemon.log_path in files
    assert not [s for s in secrets if any(s in text for text in seen)]
    assert secrets[0].decode() not in repr(read_key_pair(next(guarded.keys.glob("*.key_secret"))))


def tta(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the command line."""
    command = [sys.executable, "-m", "tta", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_line_shows_its_keys(guarded: Guarded) -> None:
    """`tta --key --server-key` works with the right role and says what is missing, or denied, otherwise."""
    key, server = guarded.keys / "camera.key_secret", guarded.keys / "daemon.key"
    control = ("--control", guarded.daemon.control)

    assert tta("--key", key, "--server-key", server, "status", *control).returncode == 0
    denied = tta("--key", key, "--server-key", server.read_text().split('"')[1], "reset", *control)
    assert (denied.returncode, denied.stdout) == (2, "")
    assert "needs the role admin" in denied.stderr
    alone = tta("--key", key, "status", *control)
    assert alone.returncode == 2
    assert "--server-key" in alone.stderr


def test_keygen_makes_keys_that_get_in(tmp_path: Path) -> None:
    """`tta keygen` writes a secret only its owner reads, prints the list's line, and overwrites nothing."""
    made = tta("keygen", "line-3", "--folder", tmp_path, "--roles", "predict,label", "--json")
    found = json.loads(made.stdout)

    assert stat.S_IMODE(Path(found["secret"]).stat().st_mode) == 0o600
    assert read_key_pair(Path(found["secret"])).public.decode() == found["key"]
    (tmp_path / "clients.yaml").write_text(found["client"])
    clients = Clients(tmp_path / "clients.yaml")
    assert clients.check(found["key"], "label") == "line-3"
    with pytest.raises(DeniedError, match="role admin"):
        clients.check(found["key"], "admin")

    again = tta("keygen", "line-3", "--folder", tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert tta("keygen", "../x", "--folder", tmp_path).returncode == 2
    assert tta("keygen", "x", "--folder", tmp_path, "--roles", "root").returncode == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clients.yaml", "line-3.key", "line-3.key_secret"]


def test_a_quota_refuses_what_is_too_much_and_says_when_to_come_again(guarded: Guarded) -> None:
    """Over its images or labels a second a client gets a code and a time; without retries it sees them at once."""
    listed = json.loads(guarded.clients.read_text())
    listed["camera"] |= {"images_s": 4, "labels_s": 1, "roles": ["predict", "label"]}
    slow = guarded.clients.with_suffix(".slow")
    slow.write_text(json.dumps(listed))
    guarded.put(slow)
    credentials = guarded.credentials("camera")
    addresses = (guarded.daemon.endpoint, guarded.daemon.control)
    image = np.zeros((6, *IMAGE.shape[1:]), np.uint8)
    with Client(*addresses, 20.0, retry=False, credentials=credentials) as camera:

        def refused() -> OverloadedError | None:
            try:
                camera.predict(image)
            except OverloadedError as error:
                return error
            return None

        error = until(refused, "the quota of images")
        assert "'camera' has sent more than 4 images a second" in str(error)
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= 0.5  # two images over, at four a second

        def labels_refused() -> bool:
            try:
                camera.label([1, 2, 3], [0, 0, 0])
            except OverloadedError as error:
                return "1 labels a second" in str(error)
            return False

        until(labels_refused, "the quota of labels")
    with Client(*addresses, 20.0, credentials=credentials) as patient:
        assert len(patient.predict(image).logits) == 6  # it comes again when it is told to
    guarded.allow(PEOPLE)


def test_labels_of_two_clients_are_held_against_each_other(guarded: Guarded) -> None:
    """What two clients label differently is contested, the one who contradicts is in status, metrics and log."""
    guarded.allow({**PEOPLE, "stranger": ["label"]})
    images = np.random.default_rng(3).integers(0, 256, (64, *IMAGE.shape[1:]), np.uint8)
    with guarded.client("camera") as camera, guarded.client("annotator") as annotator:
        answer = camera.predict(images)
        right = [int(c) for c in answer.logits.argmax(axis=1)]
        wrong = [(c + 1) % 10 for c in right]
        ids = list(answer.prediction_ids)
        assert annotator.label(ids[:32], right[:32]) == ["joined"] * 32
        with guarded.client("stranger") as stranger:
            assert stranger.label(ids[31:], wrong[31:]) == ["contested"] + ["joined"] * 32
    with guarded.client("operator") as operator:
        disagree = until(lambda: operator.status()["clients_disagree"], "the comparison")
        named = {each["client"]: each for each in disagree}
        assert set(named) == {"annotator", "stranger"}  # of two, nobody can say which
        assert (named["stranger"]["labels"], named["stranger"]["errors"]) == (32, 32)
        assert operator.status()["labels_contested"] == {"annotator": 1, "stranger": 1}
        assert operator.label([ids[31]], [right[31]]) == ["joined"]  # an admin settles it
        assert operator.status()["labels_contested"] == {}
    with urllib.request.urlopen(f"http://{guarded.daemon.http}/metrics", timeout=10) as reply:
        page = reply.read().decode()
    assert 'tta_client_disagrees{client="stranger"} 1.0' in page
    assert 'tta_labels_total{outcome="contested"} 1.0' in page
    assert '"client_disagrees"' in guarded.daemon.log_path.read_text()
    guarded.allow(PEOPLE)
    with guarded.client("operator") as operator:
        until(lambda: not operator.status()["clients_disagree"], "one alone, whom nobody contradicts")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "dict"),
        ("a: {key: 'KEY', roles: [predict], images_s: 0}", "a: 0.0 a second"),
        ("a: {key: short, roles: [predict]}", "40 characters"),
        ("a: {key: 'KEY', roles: [root]}", "root"),
        ("a: {key: 'KEY', roles: [predict], rolls: []}", "rolls"),
        ("a: {key: 'KEY', roles: []}\nb: {key: 'KEY', roles: []}", "same key"),
        ("a: {", "clients.yaml"),
        ("2024-11-31: {key: 'KEY', roles: []}", "month"),
        ("a: !!int x", "clients.yaml"),
        ("a: {key: 'KEY', roles: [admin]}\na: {key: 'KEY', roles: []}", "'a' is listed twice"),
    ],
)
def test_a_bad_list_is_named(tmp_path: Path, text: str, message: str) -> None:
    """A list of clients that cannot be used gives an error with its file and entry."""
    path = tmp_path / "clients.yaml"
    path.write_text(text.replace("KEY", zmq.curve_keypair()[0].decode()))

    with pytest.raises(ConfigError, match=message) as caught:
        Clients(path)
    assert str(path) in str(caught.value)


def test_an_empty_list_lets_nobody_in(tmp_path: Path) -> None:
    """When the last line has gone everybody has; a list that is gone itself changes nothing, and is said."""
    key = zmq.curve_keypair()[0].decode()
    path = tmp_path / "clients.yaml"
    path.write_text(f"'7': {{key: '{key}', roles: [admin]}}")
    clients = Clients(path)
    assert clients.check(key, "admin") == "7"

    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        clients.refresh()
    assert clients.check(key, "admin") == "7"

    path.write_text("# nobody any more\n")
    until(clients.refresh, "another look")
    with pytest.raises(DeniedError, match="not on the daemon's list"):
        clients.check(key, None)


def test_a_bad_key_file_is_named(tmp_path: Path) -> None:
    """A key that is missing, public where the secret is wanted, or nonsense gives an error with its file."""
    public, _ = write_key_pair(tmp_path, "a")
    (tmp_path / "b.key_secret").write_text('curve\n  public-key = "short"\n  secret-key = "short"\n')
    for path in (tmp_path / "none.key_secret", public, tmp_path / "b.key_secret"):
        with pytest.raises(ConfigError, match=str(path)):
            read_key_pair(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"daemon.control": "tcp://0.0.0.0:5556"}, "daemon.control = 'tcp://0.0.0.0:5556' lets other machines in"),
        ({"server.endpoint": "tcp://127.0.0.1:1,tcp://10.0.0.7:2"}, "server.endpoint = 'tcp://10.0.0.7:2'"),
        ({"daemon.control": "tcp://127.0.0.1:0;0.0.0.0:5556"}, "daemon.control = "),
        ({"daemon.control": "ipc://@abstract"}, "daemon.control = "),
        ({"daemon.control": "tcp://127.0.0.1.example.org:1"}, "lets other machines in"),
        ({"security.key": "a.key_secret"}, "security.key is set and security.clients is not"),
        ({"security.clients": "a.yaml"}, "security.clients is set and security.key is not"),
    ],
)
def test_other_machines_need_keys_or_a_word(settings: dict[str, str], message: str) -> None:
    """An endpoint that other machines reach is refused without keys, unless the configuration says so out loud."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings)
    assert message in str(caught.value)


def test_what_only_this_machine_reaches_needs_no_keys() -> None:
    """Loopback and ipc are taken without keys, and any address with `plaintext`."""
    local = "tcp://localhost:1,tcp://127.3.2.1:2,tcp://[::1]:3,ipc:///tmp/x"
    assert load_config(None, {"server.endpoint": local}).server.endpoints == local.split(",")
    open_ = load_config(None, {"daemon.control": "tcp://*:5556", "security.plaintext": "true"})
    assert open_.daemon.control == "tcp://*:5556"


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Clients]:
    """A key, and a list with it alone."""
    key, _ = zmq.curve_keypair()
    path = tmp_path_factory.mktemp("listed") / "clients.yaml"
    path.write_text(f"a: {{key: '{key.decode()}', roles: []}}")
    return key, Clients(path)


@given(frames=st.lists(st.binary(max_size=40), max_size=9), curve=st.booleans())
def test_the_doorkeeper_lets_nobody_in_by_mistake(
    listed: tuple[bytes, Clients], frames: list[bytes], curve: bool
) -> None:
    """Whatever libzmq might ask, an answer comes back, and it is yes only for a CURVE key on the list."""
    key, clients = listed
    if curve and len(frames) >= 7:
        frames = [*frames[:5], b"CURVE", frames[6]]

    answer, refused = _zap(frames, clients)
    assert (answer[2], len(answer)) == (b"400", 6)
    assert refused is not None

    answer, refused = _zap([b"1.0", b"1", b"tta", b"here", b"", b"CURVE", z85.decode(key)], clients)
    assert (answer[2], answer[4], refused) == (b"200", key, None)


def test_the_roles_are_those_of_the_documentation() -> None:
    """README and code name the same roles."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert all(f"`{role}`" in text for role in ROLES)


def test_the_daemons_key_is_renewed_under_traffic(bundle_path: Path, tmp_path: Path) -> None:
    """Clients that know both keys go on over the change and lose no request; the old key alone is refused.

    A file that holds no key changes nothing, and the next daemon adopts the server that has the new key.
    """
    keys, clients = tmp_path / "keys", tmp_path / "clients.yaml"
    for name in ("daemon", "next", "operator"):
        write_key_pair(keys, name)
    publics = [read_key_pair(keys / f"{name}.key_secret").public.decode() for name in ("daemon", "next")]
    operator = keys / "operator.key_secret"
    clients.write_text(f"operator: {{key: '{read_key_pair(operator).public.decode()}', roles: [admin]}}")
    both = Credentials.read(operator, *publics)
    settings = {"security.key": str(keys / "daemon.key_secret"), "security.clients": str(clients)}
    daemon = DaemonProcess(bundle_path, tmp_path / "daemon", settings, credentials=both)
    daemon.start()

    def renew(name: str, event: str) -> None:
        before = daemon.log_path.read_text().count(event)
        (keys / f"{name}.key_secret").replace(keys / "daemon.key_secret")
        until(lambda: daemon.log_path.read_text().count(event) >= before + 2, "the change in both processes")

    def go_on(client: Client, meanwhile: Callable[[], None]) -> list[Prediction]:
        """Predict and ask from here, while another thread does something."""
        work, found = threading.Thread(target=meanwhile), []
        work.start()
        while work.is_alive() or len(found) < 50:
            found.append(client.predict(IMAGE))
            assert client.status()["state"] == "stable"
        work.join()
        return found

    try:
        with Client(daemon.endpoint, daemon.control, 20.0, credentials=both) as client:
            found = go_on(client, lambda: renew("next", "key_renewed"))
            assert len({p.prediction_id for p in found}) == len(found)
            found = go_on(client, lambda: None)
            assert len(found) == 50

        async def over_asyncio() -> None:
            async with AsyncClient(daemon.endpoint, daemon.control, 20.0, credentials=both) as client:
                assert await client.ready()
                assert (await client.status())["state"] == "stable"

        asyncio.run(over_asyncio())
        new_only, old_only = (Credentials.read(operator, public) for public in reversed(publics))
        with Client(daemon.endpoint, daemon.control, 20.0, credentials=new_only) as client:
            assert client.ready()
            assert client.status()["state"] == "stable"
        with Client(daemon.endpoint, daemon.control, 3.0, credentials=old_only) as client:
            with pytest.raises(UnauthenticatedError):
                client.ready()
            with pytest.raises(UnauthenticatedError):
                client.status()

        (keys / "broken.key_secret").write_text("no key")
        renew("broken", "key_refused")
        with Client(daemon.endpoint, daemon.control, 20.0, credentials=new_only) as client:
            assert client.ready()
            server = client.status()["processes"]["server"]["pid"]
        write_key_pair(keys, "third")
        third = read_key_pair(keys / "third.key_secret").public.decode()
        renew("third", "key_renewed")
        daemon.process.kill()
        daemon.process.wait()
        daemon.credentials = Credentials.read(operator, publics[0], third)
        daemon.start()
        with daemon.client() as client:
            assert client.status()["processes"]["server"]["pid"] == server
    finally:
        daemon.stop()
