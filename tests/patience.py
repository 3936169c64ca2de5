"""How long a test waits for what must come, on a machine however busy: only a hang takes longer."""

PATIENCE_S = 900.0
