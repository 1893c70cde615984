"""Run an answer and its tests in two isolated processes, for ``judge=code``.

The modules here run in new Python processes, and import only the standard library and each other. ``start`` isolates
the process from the machine (``isolation``) and forks it. In one process, ``answer`` runs the response's code and
evaluates calls of its names; in the other, ``testing`` runs the tests. ``wire`` is the connection between the two,
which passes plain values. ``form`` finds the names that tests need from an answer, and tests that cannot work in this
way.
"""

PASSED, FAILED, NOT_ISOLATED = 0, 1, 3  # exit codes of a process that runs tests
WORK = "/answer"  # the folder in which an answer works, in its private file system
# Files and folders that Python and its packages need, besides their own folders.
SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin"),
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"),
)
