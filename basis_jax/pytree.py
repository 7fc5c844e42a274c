"""The decorator of all types that are passed through jit."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass registered with JAX; every field is a child.

    JAX rebuilds instances with ``object.__new__``. So shape checks run when you construct an
    instance, but not when ``vmap`` or ``tree.map`` puts other values into its leaves.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # it is a dataclass here
    names = tuple(field.name for field in fields)

    def flatten_with_keys(instance):
        return tuple((jax.tree_util.GetAttrKey(n), getattr(instance, n)) for n in names), None

    def flatten(instance):
        return tuple(getattr(instance, n) for n in names), None

    def unflatten(_, children):
        instance = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(instance, name, child)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
