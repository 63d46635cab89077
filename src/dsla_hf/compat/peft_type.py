"""Adds `DSLA` to PEFT's list of methods.

`peft.register_peft_method` takes methods from outside, but only those whose name is in the `PeftType` enum, and other
code (transformers' adapter loading) wants a true member. PEFT has no public way to add one, so this file uses enum
internals; `tests/compat/test_peft_type.py` fails when they change. The member exists in this process only: whoever loads an
adapter imports `dsla_hf` first.
"""

from peft import PeftType


def _add_member(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


DSLA = _add_member("DSLA")
