"""What you do with a trained looped model: `looped eval`, `looped plot`, `looped ask`, `looped bench`."""
