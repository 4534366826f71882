"""What is installed here as constraints: `python .ci/freeze.py > .ci/constraints.txt` (`make update-constraints`).

Every distribution but this one, without the local part of a version (`+cpu`), which is a machine's choice.
"""

from __future__ import annotations

from importlib import metadata

OURS = "edgerazor-toolchain"


def main() -> None:
    found = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in metadata.distributions()}
    print("# Exactly what was tested; made by `make update-constraints`.")
    for name, version in sorted(found.items()):
        if name not in (OURS, "pip"):
            print(f"{name}=={version.partition('+')[0]}")


if __name__ == "__main__":
    main()
