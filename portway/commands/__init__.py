"""What `portway COMMAND` runs; each command's module is imported when it is typed."""
