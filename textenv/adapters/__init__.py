"""The environment as other libraries' clients need it."""
