"""Write constraints.txt: `python deploy/pin.py` in an environment in which the tests have passed.

Of everything that tta's extras need, and what those need in turn, the version that is installed.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "tta-daemon"
EXTRAS = {"serve", "daemon", "adapt"}


def pins() -> dict[str, str]:
    """Name to version, of what is installed."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()

    def follow(name: str, extras: set[str]) -> None:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            return  # for another platform
        if name != OURS:
            found[name] = package.version.partition("+")[0]  # without where it was built
        for text in package.requires or []:
            need = Requirement(text)
            for extra in extras or {""}:
                key = (canonicalize_name(need.name), extra + "|" + ",".join(sorted(need.extras)))
                if key not in seen and (need.marker is None or need.marker.evaluate({"extra": extra})):
                    seen.add(key)
                    follow(key[0], {*need.extras})

    follow(OURS, EXTRAS)
    return found


def main() -> None:
    """Write the file."""
    found = pins()
    found["onnxruntime"] = found["onnxruntime-gpu"]  # the same release without CUDA
    lines = [
        "# Versions the tests have passed with; written by pin.py.",
        *(f"{n}=={v}" for n, v in sorted(found.items())),
    ]
    Path(__file__).with_name("constraints.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
