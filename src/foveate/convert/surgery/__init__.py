"""Linear algebra and replacements that several conversions share."""
