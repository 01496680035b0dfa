"""(room docstring to be written by its author)"""

if __name__ != "pocketvlm.teachers":
    raise ImportError("import this package as pocketvlm.teachers; a second copy under 'teachers' would duplicate every class")
