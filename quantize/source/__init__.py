"""Which checkpoint a MODEL means: models.lock, a folder, an installed package or the Hub; and every fact of it."""
