"""The config of an earlier run, from the run's config.json or from a checkpoint."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

from typeguard import TypeCheckError, check_type

from basis_jax.config import Config


def config_from(values: Mapping[str, Any]) -> Config:
    """The ``Config`` that ``dataclasses.asdict`` made ``values`` of, from a run's config.json or a
    checkpoint. Fields that it lacks keep their defaults. Raises ValueError for unknown ones and for
    values of another type."""
    return _replaced(Config(run_dir=""), renamed(values))


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config in today's names: ``loss.tis_cap`` is ``loss.sampler_correction`` tis now."""
    if not isinstance(values.get("loss", {}), Mapping):
        return dict(values)
    loss = dict(values.get("loss", {}))
    if cap := loss.pop("tis_cap", 0):
        loss |= {"sampler_correction": "tis", "sampler_cap": cap}
    return {**values, "loss": loss}


def _replaced(section: Any, values: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(section)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"the saved config has the field {unknown[0]}, unknown to this version")
    hints, changed = get_type_hints(type(section)), {}
    for name, value in values.items():
        before = getattr(section, name)
        if is_dataclass(before):
            value = _replaced(before, value) if isinstance(value, Mapping) else value
        changed[name] = tuple(value) if isinstance(value, list) else value
        try:
            check_type(changed[name], hints[name])
        except TypeCheckError as error:
            raise ValueError(f"the saved config has a wrong {name}: {error}") from error
    return replace(section, **changed)
