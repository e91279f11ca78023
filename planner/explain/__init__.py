"""What was decided, for people: as text, plain diffusers code, a page, a figure, a comparison. Renders, never recomputes."""
