"""Recipes: one a page."""
