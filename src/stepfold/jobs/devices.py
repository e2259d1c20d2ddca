"""The device that a command or a call works on."""

from stepfold.errors import UserError, first_line


def usable_device(name: str) -> str:
    """The device, if this machine has it; `auto` is cuda where there is one, else cpu.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = first_line(error)
        reason = "torch knows no such device" if "device string" in said else said
        raise UserError(f"--device {name} cannot be used here ({reason}); cpu always can") from None
    return name
