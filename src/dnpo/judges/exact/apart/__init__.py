"""How ``judge=code`` runs an answer and its tests, in two processes apart from everything else.

The modules here run in new Python processes, import the standard library and each other alone, and know nothing of
dnpo. ``start`` closes the process off from the machine (``isolation``) and forks: ``answer`` runs the response's code
and serves its names, ``testing`` runs the tests against them. ``wire`` is what passes between the two: plain values.
``form`` says which names tests want of an answer, and which tests could not work this way.
"""

PASSED, FAILED, NOT_ISOLATED = 0, 1, 3  # how a process that runs tests ends
WORK = "/answer"  # the folder that an answer works in, in a file system of its own
# What Python and its packages need besides their own folders.
SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin"),
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"),
)
