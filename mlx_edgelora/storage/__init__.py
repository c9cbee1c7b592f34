"""Files: checked, replaced whole, mapped, scratch."""
