"""Certificates: files in PEM -> what a connection is secured with, or what is wrong with them.

Built once when the configuration is checked, so that a bad file is a mistake of the configuration, and again where it
is used.
"""

from __future__ import annotations

import ssl
from hashlib import sha256

FILE_BYTES_MAX = 4 << 20  # the authorities that systems trust are 0.2 MB


class BadFile(ValueError):
    """The files do not do. The message names the key at fault, never what a file holds."""


def for_clients(cert_file: str, key_file: str, client_ca_file: str | None = None) -> ssl.SSLContext:
    """What a listener shows to its clients; with `client_ca_file`, what they have to show it. Raises BadFile."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    renew(context, cert_file, key_file)
    if client_ca_file is not None:
        _trust(context, "client_ca_file", client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def for_upstream(
    ca_file: str | None, client_cert_file: str | None, client_key_file: str | None
) -> ssl.SSLContext | None:
    """What an upstream has to show, and what it is shown; None where that is the system's to say. Raises BadFile."""
    if ca_file is None and client_cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca_file is None:
        context.load_default_certs()
    else:
        _trust(context, "ca_file", ca_file)
    if client_cert_file is not None:
        _show(context, "client_cert_file", client_cert_file, "client_key_file", client_key_file)
    return context


def fingerprint(*files: str | None) -> str:
    """What these files hold, in a few characters; "" for none. Raises BadFile."""
    held = sha256()
    try:
        for name in filter(None, files):
            with open(name, "rb") as file:
                held.update(file.read(FILE_BYTES_MAX))
    except OSError as error:
        raise _unreadable("a file of certificates", error) from None
    return held.hexdigest() if any(files) else ""


def renew(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """From now on a listener shows these to clients that connect. Raises BadFile, and then shows what it did before."""
    _show(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "cert_file", cert_file, "key_file", key_file)
    _show(context, "cert_file", cert_file, "key_file", key_file)


def _show(context: ssl.SSLContext, cert: str, cert_file: str, key: str, key_file: str | None) -> None:
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    except (ssl.SSLError, _Asked):
        raise BadFile(
            f"{cert} and {key} are no certificate and its key, in PEM and without a password; give two that fit"
        ) from None
    except (OSError, ValueError) as error:
        raise _unreadable(f"{cert} or {key}", error) from None


def _trust(context: ssl.SSLContext, name: str, file: str) -> None:
    try:
        context.load_verify_locations(file)
    except ssl.SSLError:
        raise BadFile(f"{name} holds no certificates in PEM; give those of the authorities to be trusted") from None
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: OSError | ValueError) -> BadFile:
    why = error.strerror if isinstance(error, OSError) else "no file has such a name"
    return BadFile(f"{name} cannot be read ({why}); its path starts at the configuration's folder")


class _Asked(Exception):
    """The key has a password."""


def _no_password() -> str:
    """Else OpenSSL would ask for it at the terminal."""
    raise _Asked
