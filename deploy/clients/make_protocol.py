"""Write the examples of the protocol document: `python deploy/clients/make_protocol.py`.

Puts `vectors.json` (headers, and the exact frames in hexadecimal) and the rules and examples of `README.md` beside
this file. A test holds both equal to what the code encodes.
"""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tta import protocol
from tta.errors import OverloadedError
from tta.server.frontend import top_classes

HERE = Path(__file__).parent
X = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
LOGITS = np.array([[1.5, -2.0, 0.25]], np.float32)
PNG = np.frombuffer(  # one grey pixel
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001e221bc33"
        "0000000049454e44ae426082"
    ),
    np.uint8,
)
ID = 1_795_375_037_838_307  # a prediction's

Header = msgspec.Struct | dict[str, Any]


def messages() -> dict[str, tuple[str, str, Header, tuple[Any, ...]]]:
    """Name to (socket, who sends it, header, tensors)."""
    ok = {"v": 1, "code": 0}
    return {
        "predict": (
            *("data", "client"),
            protocol.Predict(id=1, dtype="uint8", shape=[1, 2, 2, 3], client="4f1d", deadline_s=0.5),
            (X,),
        ),
        "predict of a file": (
            *("data", "client"),
            protocol.Predict(id=9, dtype="bytes", shape=[1], sizes=[len(PNG)], top_k=2),
            (PNG,),
        ),
        "its answer, by name": (
            *("data", "server"),
            {
                **{**ok, "id": 9, "version": 3, "prediction_id": ID + 1, "credit": 256},
                **{"queue_s": 0.000125, "compute_s": 0.0015, "shape": [1, 3]},
                "top": top_classes(LOGITS, 2, ["cat", "dog", "frog"]),
            },
            (),
        ),
        "predict's answer": (
            *("data", "server"),
            {
                **{**ok, "id": 1, "version": 3, "prediction_id": ID, "credit": 256},
                **{"queue_s": 0.000125, "compute_s": 0.0015, "shape": [1, 3]},
            },
            (LOGITS,),
        ),
        "a refusal": (
            *("data", "server"),
            protocol.error_reply(1, OverloadedError("the queue is full", 0.25)),
            (),
        ),
        "cancel": ("data", "client", protocol.Cancel(id=1, client="4f1d"), ()),
        "metadata": ("data", "client", protocol.Metadata(id=2), ()),
        "ready": ("data", "client", protocol.Ready(id=3), ()),
        "ready's answer": ("data", "server", {**ok, "id": 3, "ready": True}, ()),
        "label": ("control", "client", protocol.Label(id=4, prediction_ids=[ID], labels=[7]), ()),
        "label's answer": ("control", "daemon", {**ok, "id": 4, "outcomes": ["joined"]}, ()),
        "right or wrong": ("control", "client", protocol.Label(id=5, prediction_ids=[ID], correct=[False]), ()),
        "label of an image": (
            *("control", "client"),
            protocol.Label(id=6, labels=[7], shape=[1, 2, 2, 3]),
            (X,),
        ),
        "status": ("control", "client", protocol.Status(id=7), ()),
        "rollback": ("control", "client", protocol.Rollback(id=8, version=2), ()),
    }


def vectors() -> list[dict[str, Any]]:
    """Each message with its header as JSON and its frames in hexadecimal."""
    found = []
    for name, (socket, sender, header, tensors) in messages().items():
        frames = protocol.encode(header, *tensors)
        found.append(
            {
                "name": name,
                "socket": socket,
                "sender": sender,
                "header": msgspec.msgpack.decode(frames[0]),
                "frames": [frame.hex() for frame in frames],
            }
        )
    return found


def examples() -> str:
    """The vectors as Markdown."""
    lines = []
    for v in vectors():
        lines += [f"**{v['name']}** ({v['sender']}, {v['socket']} socket)", "", "```text"]
        lines += [json.dumps(v["header"]), *(f"frame {i}: {frame}" for i, frame in enumerate(v["frames"]))]
        lines += ["```", ""]
    return "\n".join(lines).rstrip()


def document() -> str:
    """`README.md` with the present examples and rules."""
    text = (HERE / "README.md").read_text()
    for name, content in (("examples", examples()), ("rules", rules())):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
        text = re.sub(pattern, lambda found, new=content: found[1] + new + found[2], text, flags=re.DOTALL)
    return text


def rules() -> str:
    """The docstring of the protocol's module, without its first line, and what each request says."""
    rows = ["| operation | field | |", "| --- | --- | --- |"]
    for request in dict.fromkeys((*protocol.DataRequest.__args__, *protocol.ControlRequest.__args__)):
        doc = " ".join((request.__doc__ or "").partition("Attributes:")[0].split())
        rows.append(f"| `{request.__struct_config__.tag}` | | {doc} |")
        notes = _attributes(request.__doc__ or "")
        for name, default in zip(request.__struct_fields__, _defaults(request), strict=True):
            if name not in ("v", "id"):
                rows.append(f"| | `{name}` | {default}{'; ' + notes[name] if name in notes else ''} |")
        for name, note in protocol.REPLIES[str(request.__struct_config__.tag)].items():
            rows.append(f"| | ← `{name.removesuffix('?')}` | {'not always; ' if '?' in name else ''}{note} |")
    overview = (protocol.__doc__ or "").partition("\n\n")[2].rstrip()
    return "\n".join(["```text", overview, "```", "", *rows])


def _defaults(request: Any) -> list[str]:
    n_required = len(request.__struct_fields__) - len(request.__struct_defaults__)
    given = ["required"] * n_required
    for default in request.__struct_defaults__:
        value = default.factory() if hasattr(default, "factory") else default
        given.append("required" if value is msgspec.NODEFAULT else f"default {json.dumps(value)}")
    return given


def _attributes(doc: str) -> dict[str, str]:
    """Field to its note in an "Attributes:" section."""
    found: dict[str, str] = {}
    name = ""
    for line in doc.partition("Attributes:")[2].splitlines():
        start = re.match(r" {8}(\w+): (.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def main() -> None:
    """Write both files."""
    (HERE / "vectors.json").write_text(json.dumps(vectors(), indent=1) + "\n")
    (HERE / "README.md").write_text(document())


if __name__ == "__main__":
    main()
