"""What you do with a trained looped model: the commands of `looped`, see cli.py."""
