"""Safe readers of file formats; they know no model and execute nothing."""
