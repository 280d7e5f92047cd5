"""Refuses settings on Windows that another user has put where all users of the machine have theirs.

`%PROGRAMDATA%` lets every user make files and directories, in those of others too, and the maker owns them. Settings
name programs that are run, so those of that directory count only where file and directory belong to an administrator,
to the system or to this user. The owner is asked of the system by ctypes; what the access list says besides is not
looked at: an administrator who lets others write into an own file has done so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arcbridge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ADMINISTRATORS = "S-1-5-32-544"
TRUSTED = (
    "S-1-5-18",  # the system itself
    ADMINISTRATORS,
    "S-1-5-80-956008885-3418522649-1831038044-1853292631-2271478464",  # TrustedInstaller
)
"""Security identifiers that are the same on each machine (MS-DTYP §2.4.2.4)."""
_SE_FILE_OBJECT = 1
_OWNER_SECURITY_INFORMATION = 1
_TOKEN_QUERY = 8
_TOKEN_USER = 1


def refuse_foreign_settings(
    file: Path, *, owner_of: Callable[[str], str] | None = None, own: Callable[[], str] | None = None
) -> None:
    """Raise ConfigError unless `file` and its directory belong to one whom this user has to trust anyway."""
    for path in (file.parent, file):
        try:
            owner = (owner_of or owner_sid)(str(path))
            trusted = owner in TRUSTED or owner == (own or own_sid)()
        except OSError as error:
            raise ConfigError(f"cannot tell to whom {path} belongs, so it is not used: {error.strerror}") from error
        if not trusted:
            raise ConfigError(
                f"{path} belongs to {owner}, who is neither you nor the administrators, and is not used: remove it, or "
                f'have an administrator run `icacls "{path}" /setowner *{ADMINISTRATORS}`'
            )


def owner_sid(path: str) -> str:
    """Return the security identifier of the owner of a file or directory, as text; raises OSError."""
    import ctypes

    system: Any = ctypes  # WinDLL exists on Windows alone
    security = system.WinDLL("advapi32", use_last_error=True)
    owner, descriptor = ctypes.c_void_p(), ctypes.c_void_p()
    # aclapi.h, GetNamedSecurityInfoW: the owner points into the descriptor, which is the caller's to free.
    code = security.GetNamedSecurityInfoW(
        ctypes.c_wchar_p(path),
        _SE_FILE_OBJECT,
        _OWNER_SECURITY_INFORMATION,
        ctypes.byref(owner),
        None,
        None,
        None,
        ctypes.byref(descriptor),
    )
    if code:
        raise OSError(code, system.FormatError(code))
    try:
        return _as_text(owner)
    finally:
        _free(descriptor)


def own_sid() -> str:
    """Return the security identifier of this process's user, as text; raises OSError."""
    import ctypes

    system: Any = ctypes
    security = system.WinDLL("advapi32", use_last_error=True)
    kernel = system.WinDLL("kernel32", use_last_error=True)
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    token, size = ctypes.c_void_p(), ctypes.c_ulong()
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    if not security.OpenProcessToken(process, _TOKEN_QUERY, ctypes.byref(token)):
        raise _last_error()
    try:
        # Asked for its size first, as its documentation wants; that call fails.
        security.GetTokenInformation(token, _TOKEN_USER, None, 0, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        if not security.GetTokenInformation(token, _TOKEN_USER, buffer, size, ctypes.byref(size)):
            raise _last_error()
        # TOKEN_USER begins with the pointer to the identifier, which is behind it in the buffer.
        return _as_text(ctypes.c_void_p.from_buffer(buffer))
    finally:
        kernel.CloseHandle(token)


def _as_text(identifier: Any) -> str:
    import ctypes

    system: Any = ctypes
    security = system.WinDLL("advapi32", use_last_error=True)
    text = ctypes.c_wchar_p()
    if not security.ConvertSidToStringSidW(identifier, ctypes.byref(text)):
        raise _last_error()
    try:
        return str(text.value)
    finally:
        _free(ctypes.cast(text, ctypes.c_void_p))


def _free(memory: Any) -> None:
    import ctypes

    system: Any = ctypes
    system.WinDLL("kernel32", use_last_error=True).LocalFree(memory)


def _last_error() -> OSError:
    import ctypes

    system: Any = ctypes
    code = system.get_last_error()
    return OSError(code, system.FormatError(code))
