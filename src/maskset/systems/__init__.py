"""The systems, one file per paper."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Discriminator

from maskset.errors import ConfigError
from maskset.instances import Category
from maskset.systems.base import InputConfig, System
from maskset.systems.isda import Isda, IsdaConfig
from maskset.systems.istr import Istr, IstrConfig
from maskset.systems.istr_smt import IstrSmt, IstrSmtConfig
from maskset.systems.soit import Soit, SoitConfig
from maskset.systems.solq import Solq, SolqConfig
from maskset.systems.sotr import Sotr, SotrConfig

CONFIGS: dict[str, type] = {
    "solq": SolqConfig,
    "soit": SoitConfig,
    "isda": IsdaConfig,
    "istr": IstrConfig,
    "istr-smt": IstrSmtConfig,
    "sotr": SotrConfig,
}
_SYSTEMS: dict[type, type[System]] = {
    SolqConfig: Solq,
    SoitConfig: Soit,
    IsdaConfig: Isda,
    IstrConfig: Istr,
    IstrSmtConfig: IstrSmt,
    SotrConfig: Sotr,
}
Config = Annotated[  # which one a file means, its `system` says
    SolqConfig | SoitConfig | IsdaConfig | IstrConfig | IstrSmtConfig | SotrConfig, Discriminator("system")
]


def build(config: Config, categories: Sequence[Category] | None = None) -> System:
    """Return an untrained model on the CPU.

    Args:
        config: the settings of one of the systems.
        categories: what the class channels stand for; by default "class 0" and so on.

    Raises:
        ConfigError: there are not `config.num_classes` categories.
    """
    named = categories if categories is not None else [Category(f"class {i}", i) for i in range(config.num_classes)]
    if len(named) != config.num_classes:
        raise ConfigError(f"model.num_classes is {config.num_classes}, but {len(named)} categories were given.")
    return _SYSTEMS[type(config)](config, tuple(named))


__all__ = ["CONFIGS", "Config", "InputConfig", "System", "build"]
