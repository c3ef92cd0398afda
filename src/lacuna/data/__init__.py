"""Rows → messages → tokens and mask → packed rows."""
