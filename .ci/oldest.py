"""The oldest versions that pyproject.toml allows, as requirements: `python .ci/oldest.py > requirements.txt`.

Of every dependency, those of development included, the lower bound; what they need in turn is pip's choice.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def lower_bound(requirement: str) -> str:
    """`name>=1.2,<3` as `name==1.2.*`.

    Raises:
        ValueError: it has no lower bound, so nobody knows what was tested.
    """
    found = re.fullmatch(r"([A-Za-z0-9._-]+(?:\[[a-z,]+\])?)>=([0-9.]+)(?:,<[0-9.]+)?", requirement.replace(" ", ""))
    if found is None:
        raise ValueError(f"{requirement}: expected NAME>=VERSION or NAME>=VERSION,<VERSION")
    return f"{found[1]}=={found[2]}.*"


def main() -> None:
    project = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    for requirement in dict.fromkeys(requirements):
        if not requirement.startswith(project["name"]):  # extras of ours that are made of others
            print(lower_bound(requirement))


if __name__ == "__main__":
    main()
