"""The systems, one file per paper. `SYSTEMS` lists them; all other lists of systems derive from it."""

from collections.abc import Sequence

from maskset.errors import ConfigError
from maskset.instances import Category
from maskset.systems.base import InputConfig, System, SystemConfig
from maskset.systems.isda import IsdaConfig
from maskset.systems.istr import IstrConfig
from maskset.systems.istr_smt import IstrSmtConfig
from maskset.systems.sextant import SextantConfig
from maskset.systems.soit import SoitConfig
from maskset.systems.solq import SolqConfig
from maskset.systems.sotr import SotrConfig

SYSTEMS: tuple[type[SystemConfig], ...] = (
    SolqConfig,
    SoitConfig,
    IsdaConfig,
    IstrConfig,
    IstrSmtConfig,
    SotrConfig,
    SextantConfig,
)
CONFIGS: dict[str, type[SystemConfig]] = {cls.system: cls for cls in SYSTEMS}


def build(config: SystemConfig, categories: Sequence[Category] | None = None) -> System:
    """Return an untrained model on the CPU.

    Args:
        config: the settings of a system, of this package or your own.
        categories: what the class channels stand for; by default "class 0", "class 1" and so on.

    Raises:
        ConfigError: `config` is not the settings of a system, or there are not `config.num_classes` categories.
    """
    if not isinstance(config, SystemConfig):
        raise ConfigError(
            f"build takes the settings of a system, such as SolqConfig() or recipes.solq_r50().model, got {config!r:.80}."
        )
    if categories is None:
        categories = [Category(f"class {i}", i) for i in range(config.num_classes)]
    if len(categories) != config.num_classes:
        raise ConfigError(f"model.num_classes is {config.num_classes}, but {len(categories)} categories were given.")
    return config.build(tuple(categories))


__all__ = ["CONFIGS", "SYSTEMS", "InputConfig", "System", "SystemConfig", "build"]
