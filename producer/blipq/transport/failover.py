"""Lists of brokers over TLS: each host is verified by its own name."""

from typing import Any

from kombu import Connection


class EachByItsName(Connection):
    """Kombu fills the name of the first host in, and would hold all others against it."""

    def _init_params(self, *args: Any, **params: Any) -> None:
        tls = params["ssl"]
        if isinstance(tls, dict) and "server_hostname" in tls:
            # A copy: kombu writes the name into what it is given, also for the next host.
            params["ssl"] = {**tls, "server_hostname": None}
        super()._init_params(*args, **params)
