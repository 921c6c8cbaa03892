"""Building an extension on first use, or saying what keeps it from being built."""

from __future__ import annotations

from ta_plugin.ops.builder.specs import OpSpec


def build(spec: OpSpec) -> str | None:
    """Load an extension, compiling it if need be (half a minute or more; seconds from the cache).

    Returns None, or what went wrong and how to change that.
    """
    try:
        from ta_plugin.ops.builder.classes import builder_of
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        return "DeepSpeed, whose op builders compile it, is not installed; pip install ta_plugin[deepspeed]"
    builder = builder_of(spec)
    try:
        builder.load()
    except RuntimeError as error:  # what torch raises for a failed compilation, and DeepSpeed for a missing tool
        lines = str(error).splitlines()
        cause = next((line.strip() for line in lines if "error:" in line), lines[0])  # the compiler's first complaint
        return builder.error_log or f"building {spec.name} failed: {cause}"
    return None
