"""Translate pydantic's errors into this project's form: each wrong field with its remedy."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError, join, shown
from megatron_hybrid.base.section import Section

Location = tuple[int | str, ...]


def translate(error: ValidationError, root: type[Section]) -> ConfigError:
    """Return pydantic's error about `root` as a ConfigError."""
    problems: dict[tuple[str, str], None] = {}  # an ordered set
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # pydantic does not count wrong entries, which it has reported already
        if isinstance(cause, ConfigError):
            problems |= {(join(*detail["loc"], field), message): None for field, message in cause.problems}
        else:
            location, message = _message(detail, root)
            problems[join(*location), message] = None
    return ConfigError(*problems)


def section_in(annotation: object) -> type[Section] | None:
    """Return the section in an annotation such as `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((section for inner in get_args(annotation) if (section := section_in(inner))), None)


def field_at(root: type[Section], location: Location) -> tuple[FieldInfo | None, type[Section] | None]:
    """Return the field at `location`, and the section that it holds, if any."""
    field, section = None, root if not location else None
    here: type[Section] | None = root
    keyed = False
    for part in location:
        if isinstance(part, int) or keyed:  # an entry of a list or of a mapping
            keyed = False
            continue
        if here is None or part not in here.fields():
            return None, None
        field = here.fields()[part]
        here = section = section_in(field.annotation)
        keyed = get_origin(field.annotation) is Mapping
    return field, section


def field_paths(root: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the path of every field and section: `train`, `train.optimizer`, `train.optimizer.lr`, ..."""
    for name, field in root.fields().items():
        yield (path := join(prefix, name))
        if get_origin(field.annotation) is not Mapping and (section := section_in(field.annotation)):
            yield from field_paths(section, path)


_SAME_AS = {
    "batch_size": "train.global_batch_size", "bf16": "train.dtype",
    "cp": "parallel.context_parallel_size", "d_model": "model.hidden_size",
    "fp16": "train.dtype", "iters": "train.steps", "layers": "model.layer_pattern",
    "learning_rate": "train.optimizer.lr",
    "log_interval": "logging.interval", "lr_warmup_iters": "train.schedule.warmup_steps", "max_steps": "train.steps",
    "n_layers": "model.layer_pattern", "num_layers": "model.layer_pattern",
    "num_query_groups": "model.num_key_value_heads", "pp": "parallel.pipeline_parallel_size",
    "precision": "train.dtype", "save": "run_dir", "save_interval": "checkpoint.interval",
    "seq_len": "data.sequence_length", "seq_length": "data.sequence_length", "tp": "parallel.tensor_parallel_size",
    "train.optimizer.optimizer": "train.optimizer.kind",
    "train_iters": "train.steps", "vpp": "parallel.virtual_pipeline_parallel_size",
    "warmup": "train.schedule.warmup_steps",
}  # fmt: skip
"""Names of our fields in other projects; whole paths first."""

_SAME_VALUE = {
    "bfloat16": "bf16",
    "float16": "bf16",
    "fp16": "bf16",
    "half": "bf16",
    "null": "none",
    "float32": "fp32",
    "float": "fp32",
}


def fields_called(name: str, root: type[Section]) -> list[str]:
    """Return the paths of the fields below `root` that are called `name`, here or in other projects."""
    found = [path for path in field_paths(root) if path.rpartition(".")[2] == name]
    return found or ([_SAME_AS[name]] if name in _SAME_AS else [])


def _unknown(location: Location, root: type[Section]) -> str:
    """Return the message for a field that does not exist."""
    name = str(location[-1])
    _, section = field_at(root, location[:-1])
    names = list(section.fields()) if section else []
    elsewhere = [path for path in field_paths(root) if path.rpartition(".")[2] == name]
    if meant := _SAME_AS.get(join(*location)):
        hint = f"did you mean {meant}?"
    elif found := nearest.word(name, names, cutoff=0.7):
        hint = f"did you mean {found}?"
    elif elsewhere:
        hint = f"did you mean {' or '.join(elsewhere)}?"
    elif meant := _SAME_AS.get(name):
        hint = f"did you mean {meant}?"
    elif found := nearest.word(name, names, cutoff=0.5):
        hint = f"did you mean {found}?"
    else:
        hint = f"the fields here are {', '.join(names)}"
    return f"there is no such field; {hint}"


def _message(detail: ErrorDetails, root: type[Section]) -> tuple[Location, str]:
    """Return the location of the wrong field and the message."""
    location, kind, value = detail["loc"], detail["type"], detail.get("input")
    context: dict[str, Any] = detail.get("ctx", {})
    field, section = field_at(root, location)
    match kind:
        case "extra_forbidden":
            return location, _unknown(location, root)
        case "missing" if location and isinstance(location[-1], int):
            wanted = len(get_args(field.annotation)) if field is not None else location[-1] + 1
            return location[:-1], f"{shown(value)} has too few entries; give {wanted}{_such_as(field)}"
        case "missing":
            return location, f"is missing; {_wanted(field, section)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            names = f": its fields are {', '.join(section.fields())}" if section else ""
            return location, f"{shown(value)} is not a section; write `name: value` lines{names}"
        case "literal_error":
            return location, _not_a_choice(value, field)
        case "int_parsing_size":
            return location, f"{shown(value)} is too large; give a smaller number{_such_as(field)}"
        case "int_type":
            return location, _not_whole(value, field)
        case "float_type":
            return location, f"{shown(value)} is not a number; {_unquoted(value, field)}"
        case "bool_type":
            meant = (
                "false"
                if shown(value).strip("'\"").lower() in ("0", "0.0", "no", "off", "n", "f", "none", "null", "false")
                else "true"
            )
            return location, f"{shown(value)} is not true or false; write {meant}"
        case "string_type":
            return location, f'{shown(value)} is not text; write "{value}", in quotes' if isinstance(
                value, int | float
            ) else (f"{shown(value)} is not text; {_wanted(field, section)}")
        case "tuple_type":
            return (
                location,
                f"{shown(value)} is not a list; write [{value if isinstance(value, int | float | str) else '...'}]",
            )
        case "too_short":
            return (
                location,
                f"has {context['actual_length']} entries; give at least {context['min_length']}{_such_as(field)}",
            )
        case "too_long":
            return (
                location,
                f"has {context['actual_length']} entries or more; {context['max_length']} are wanted{_such_as(field)}",
            )
        case "string_too_short":
            return location, f"is empty; {_wanted(field, section)}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return location, _out_of_bounds(value, kind, context, field)
        case "finite_number":
            return location, f"{shown(value)} is not a finite number; give a finite one{_such_as(field)}"
        case "invalid_key":
            return location, "a field's name must be text; put it in quotes, or remove it"
    return location, f"{shown(value)}: {detail['msg']}; correct it"  # any other kind


def _wanted(field: FieldInfo | None, section: type[Section] | None) -> str:
    if section is not None:
        needed = [name for name, inner in section.fields().items() if inner.is_required()]
        return f"give the section with {', '.join(needed)}" if needed else "give the section, or leave it out"
    about = field.description.splitlines()[0] if field is not None and field.description else ""
    return f"give it{': ' + about.replace('`', '') if about else ''}{_such_as(field)}"


def _default(field: FieldInfo | None) -> object:
    """Return the default that may serve as an example, or None."""
    default = None if field is None or field.is_required() else field.default
    return list(default) if isinstance(default, tuple) else default


def _such_as(field: FieldInfo | None) -> str:
    default = _default(field)
    return (
        ""
        if default is None or default in ([], {}) or isinstance(default, Section)
        else f", such as {shown(default)} (the default)"
    )


def _or_null(field: FieldInfo | None) -> str:
    return ", or null" if field is not None and type(None) in get_args(field.annotation) else ""


def _not_a_choice(value: object, field: FieldInfo | None) -> str:
    choices = list(_literals(field.annotation)) if field is not None else []
    texts = [str(choice) for choice in choices]
    text = value if isinstance(value, str) else shown(value)
    meant = _SAME_VALUE.get(text.lower())
    best = meant if meant in texts else nearest.word(text, texts)
    return f"{shown(value)} is not one of {', '.join(texts)}{_or_null(field)}; the nearest is {best}"


def _literals(annotation: object) -> Iterator[object]:
    for inner in get_args(annotation):
        if isinstance(inner, str | int):
            yield inner
        else:
            yield from _literals(inner)


def _unquoted(value: object, field: FieldInfo | None) -> str:
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        number = None
    return f"write {value} without quotes" if number is not None else f"give one{_such_as(field)}{_or_null(field)}"


def _not_whole(value: object, field: FieldInfo | None) -> str:
    if isinstance(value, float) and abs(value) < 2**63:
        best = max(round(value), _smallest(field))
        return f"{shown(value)} is not a whole number; {'write' if best == value else 'the nearest is'} {best}"
    remedy = _unquoted(value, field)
    if remedy == "give one":
        remedy = f"give one, {_smallest(field)} or more"
    return f"{shown(value)} is not a whole number; {remedy}"


def _smallest(field: FieldInfo | None) -> int:
    """Return the smallest value of an integer field. pydantic keeps Ge and Gt in the metadata or in the annotation."""
    text = f"{field.metadata} {field.annotation}" if field is not None else ""
    return 0 if "Ge(ge=0)" in text else 1


def _out_of_bounds(value: object, kind: str, context: dict[str, Any], field: FieldInfo | None) -> str:
    (bound,) = (context[key] for key in ("gt", "ge", "lt", "le") if key in context)
    words = kind.replace("_", " ").replace("greater than equal", "at least").replace("less than equal", "at most")
    says = f"{shown(value)} must be {words} {bound:g}"
    if "equal" in kind:
        return f"{says}; the nearest is {bound:g}{_or_null(field)}"
    if isinstance(value, int) and isinstance(bound, int):
        return f"{says}; the nearest is {bound + 1 if kind == 'greater_than' else bound - 1}{_or_null(field)}"
    return (
        f"{says}; give a {'larger' if kind == 'greater_than' else 'smaller'} number{_such_as(field)}{_or_null(field)}"
    )
