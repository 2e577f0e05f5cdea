"""How checkpoints in S3 are reached: keys of their own, which are dropped once weights are read."""

import gc
import os
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from blipq.s3.storage import Storage
from blipq.settings import Settings, checked_endpoint_url
from blipq.submission import checked

PREFIX = "BLIPQ_MODEL_S3_"

#: Bounds one answer; a block has a deadline beside it.
_CONNECT_S, _READ_S = 5.0, 20.0


def _stripped(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


class ModelS3Settings(BaseSettings):
    """Where models named ``s3://bucket/prefix`` are. Each is read from ``BLIPQ_<NAME>``."""

    model_config = SettingsConfigDict(
        env_prefix="BLIPQ_", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    model_s3_endpoint_url: Annotated[str | None, AfterValidator(checked_endpoint_url)] = Field(
        default=None,
        repr=False,
        description="S3 endpoint that models are read from; by default that of the images.",
    )
    model_s3_region: str | None = Field(
        default=None, description="Its region; by default that of the images."
    )
    model_s3_access_key_id: Annotated[str | None, BeforeValidator(_stripped)] = Field(
        default=None,
        description=(
            "Access key for models, which needs `s3:GetObject` alone; by default that for images. "
            "Dropped before the first job."
        ),
    )
    model_s3_secret_access_key: Annotated[SecretStr | None, BeforeValidator(_stripped)] = Field(
        default=None, description="Secret key for models; by default that for images."
    )

    @model_validator(mode="after")
    def _has_both_keys(self) -> "ModelS3Settings":
        if (self.model_s3_access_key_id is None) != (self.model_s3_secret_access_key is None):
            raise ValueError(f"{PREFIX}ACCESS_KEY_ID and {PREFIX}SECRET_ACCESS_KEY go together")
        return self

    def over(self, settings: Settings) -> Settings:
        """The settings with these of S3 in place of their own."""
        own = {
            "s3_endpoint_url": self.model_s3_endpoint_url,
            "s3_region": self.model_s3_region,
            "s3_access_key_id": self.model_s3_access_key_id,
            "s3_secret_access_key": self.model_s3_secret_access_key,
        }
        return settings.model_copy(update={name: each for name, each in own.items() if each})


def model_settings() -> Settings:
    """The settings by which models are reached. Raises InvalidRequest."""
    return checked(ModelS3Settings).over(checked(Settings))


def model_storage(connections: int = 4, attempts: int = 2) -> Storage:
    """Reaches models in S3. Raises InvalidRequest."""
    return Storage(
        model_settings(),
        max_connections=connections,
        connect_timeout_s=_CONNECT_S,
        read_timeout_s=_READ_S,
        attempts=attempts,
    )


def environment_of(settings: Settings) -> dict[str, str]:
    """Variables by which another process reaches models as these settings do."""
    secret = settings.s3_secret_access_key
    found = {
        "ENDPOINT_URL": settings.s3_endpoint_url,
        "REGION": settings.s3_region,
        "ACCESS_KEY_ID": settings.s3_access_key_id,
        "SECRET_ACCESS_KEY": secret.get_secret_value() if secret else None,
    }
    return {f"{PREFIX}{name}": value for name, value in found.items() if value}


def forget_model_keys() -> None:
    """Drops the keys from the environment, and what is left of clients that had them."""
    for name in [each for each in os.environ if each.upper().startswith(PREFIX)]:
        del os.environ[name]
    gc.collect()  # the clients are circles of references
