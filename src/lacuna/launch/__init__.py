"""How runs are started on many devices and on clusters."""
