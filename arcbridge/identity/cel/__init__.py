"""CEL as kube-apiserver evaluates it in an AuthenticationConfiguration.

`compiler` parses and type-checks an expression with Google's parser and checker, declared with the functions and
variables that Kubernetes 1.36 has (`declarations`), `evaluation` runs the checked tree. Claims never reach the library,
except for regular expressions (`regex`): what a token can contain meets Python alone. Nothing of this package is
imported unless a configuration has an expression (docs/decisions/0016-cel.md).
"""
