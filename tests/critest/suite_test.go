// The CRI validation suite as a program. Besides what the suite itself does, it puts the images that we serve in the
// place of those that can only be had from their registries, and writes what became of each spec to a file.
package main

import (
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"
	_ "unsafe" // for go:linkname

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"sigs.k8s.io/cri-tools/pkg/framework"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)

var (
	resultsFile = flag.String("results", "", "File to which the result of each spec goes, one JSON object a line.")
	digestImage = flag.String("digest-image", "", "Image by digest, in the place of the one whose digest the suite knows.")
)

func init() { framework.RegisterFlags() }

// The suite knows one image by the digest of bytes that are nowhere but in its registry. It has no flag for that one.
//
//go:linkname testImageWithDigest sigs.k8s.io/cri-tools/pkg/validate.testImageWithDigest
var testImageWithDigest string

// Called after the suite's own, which sets the variable.
var _ = framework.AddBeforeSuiteCallback(func() {
	if *digestImage != "" {
		testImageWithDigest = *digestImage
	}
})

// Result is what became of one spec.
type Result struct {
	Spec    string  `json:"spec"`
	State   string  `json:"state"`
	Message string  `json:"message"`
	Seconds float64 `json:"seconds"`
}

var _ = ginkgo.ReportAfterSuite("results", func(report types.Report) {
	if *resultsFile == "" {
		return
	}
	file, err := os.Create(*resultsFile)
	gomega.Expect(err).NotTo(gomega.HaveOccurred())
	defer file.Close()
	lines := json.NewEncoder(file)
	for _, spec := range report.SpecReports {
		if spec.LeafNodeType != types.NodeTypeIt {
			continue
		}
		state := spec.State
		if state == types.SpecStateSkipped && spec.Failure.Message == "" {
			continue // not in focus
		}
		result := Result{
			Spec:    strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " "),
			State:   state.String(),
			Message: spec.Failure.Message,
			Seconds: spec.RunTime.Seconds(),
		}
		gomega.Expect(lines.Encode(result)).To(gomega.Succeed())
	}
})

func TestCRI(t *testing.T) {
	gomega.RegisterFailHandler(ginkgo.Fail)
	ginkgo.RunSpecs(t, "CRI validation")
}
