"""The steps of a release: release.yml takes the first two before it builds, and a host of the site the third.

python .ci/release.py check v0.1.0        # the tag, the version and the changelog agree
python .ci/release.py fill https://…      # write the repository's address into the files that a package shows
python .ci/release.py versions site       # list the site's versions, site/0.1.0/ and so on, in site/versions.json
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Pages beside the source, as `[project.urls]` names them. The address itself is nowhere in the repository.
URLS = {
    "Repository": "{address}",  # notebooks/pairs.py makes the badges from it
    "Documentation": "{address}/blob/v{version}/docs/index.md",
    "Changelog": "{address}/blob/v{version}/CHANGELOG.md",
    "Issues": "{address}/issues",
}


def read_version(root: Path) -> str:
    """Return the version that pyproject.toml states."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def find_problems(root: Path, tag: str) -> list[str]:
    """Return each file that does not state the version of `tag`, and what was expected there."""
    version = read_version(root)
    problems = [] if tag == f"v{version}" else [f"pyproject.toml: version {version}, but the tag is {tag}"]
    for name, pattern in {
        "CHANGELOG.md": rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$",
        "CITATION.cff": rf"^version: {re.escape(version)}$",
        "conda/recipe.yaml": rf"^  version: {re.escape(version)}$",
    }.items():
        lines = re.findall(r"^(?:## \[|version:|  version:).*$", (root / name).read_text(encoding="utf-8"), re.M)
        if not lines or not re.fullmatch(pattern, lines[0]):
            problems.append(f"{name}: expected a line like {pattern}, found {lines[0] if lines else 'none'}")
    if not (root / "tests/files" / version).is_dir():
        problems.append(f"tests/files/{version}: missing; run python -m tests.files.record {version}")
    return problems


def fill_address(root: Path, address: str) -> None:
    """Write `[project.urls]`, CITATION.cff's `repository-code`, and absolute links into README.md."""
    address, version = address.rstrip("/"), read_version(root)
    lines = [f'{name} = "{url.format(address=address, version=version)}"' for name, url in URLS.items()]
    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    if "[project.urls]" in text:
        raise SystemExit("pyproject.toml has [project.urls] already; expected the address from this program alone")
    table = "\n".join(["[project.urls]", *lines, "", "[project.scripts]"])
    project.write_text(text.replace("[project.scripts]", table, 1), encoding="utf-8")
    citation = root / "CITATION.cff"
    text = citation.read_text(encoding="utf-8")
    citation.write_text(text + f'repository-code: "{address}"\n', encoding="utf-8")
    # A package index shows README.md without the files beside it.
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    links = re.sub(r"\]\((?!https?:|#)", f"]({address}/blob/v{version}/", text)
    readme.write_text(links, encoding="utf-8")


def list_versions(site: Path) -> list[str]:
    """Write `versions.json` beside the folders of a site's versions, the newest first, and return them."""
    folders = [path.parent.name for path in site.glob("*/objects.inv")]
    versions = sorted(folders, key=lambda name: [int(part) for part in re.findall(r"\d+", name)], reverse=True)
    (site / "versions.json").write_text(json.dumps(versions) + "\n", encoding="utf-8")
    return versions


def main() -> None:
    """Run one of the commands."""
    command, value = sys.argv[1:]
    if command == "fill":
        fill_address(ROOT, value)
    elif command == "versions":
        list_versions(Path(value))
    elif problems := find_problems(ROOT, value):
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
