"""Settings of a whole run, from one YAML file and the command line."""

from halfbyte.config.run import RunConfig, describe_settings, read_data_settings, resolve_model

__all__ = ["RunConfig", "describe_settings", "read_data_settings", "resolve_model"]
