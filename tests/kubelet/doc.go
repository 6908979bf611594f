// Package kubelet is empty: the module pins what the tests run, and builds it (see build).
package kubelet
