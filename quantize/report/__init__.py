"""Everything that was measured of one model: drift.json, and how people see it."""
