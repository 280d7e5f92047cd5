package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"time"

	certificates "k8s.io/api/certificates/v1beta1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// issued is a pod's certificate with its key, and the request that it was issued for.
type issued struct {
	bundle  []byte
	request string
	renew   time.Time
}

// signersTime is how long a signer may take.
const signersTime = 30 * time.Second

// podCertificate asks a signer as a kubelet does, with the rights of a node alone. A kubelet renews at `beginRefreshAt`, which
// is minutes away at least; here a request that somebody deleted is due as well, so that a test can rotate a certificate.
func (f *files) podCertificate(
	ctx context.Context, found map[string]file, source *core.PodCertificateProjection, mode os.FileMode,
) error {
	path := source.CredentialBundlePath
	if source.KeyType != "ECDSAP256" || path == "" {
		return fmt.Errorf("this node makes credential bundles of ECDSAP256 alone")
	}
	kept, there := f.certificate[path]
	if there {
		_, err := f.node.client.CertificatesV1beta1().PodCertificateRequests(f.pod.Namespace).Get(
			ctx, kept.request, meta.GetOptions{})
		there = !apierrors.IsNotFound(err) && time.Now().Before(kept.renew)
	}
	if !there {
		fresh, err := f.request(ctx, source)
		if err != nil {
			return err
		}
		if f.certificate == nil {
			f.certificate = map[string]issued{}
		}
		kept, f.certificate[path] = fresh, fresh
	}
	if f.pod.Spec.SecurityContext != nil && f.pod.Spec.SecurityContext.FSGroup != nil {
		mode = 0o600
	}
	found[path] = file{kept.bundle, mode}
	return nil
}

func (f *files) request(ctx context.Context, source *core.PodCertificateProjection) (issued, error) {
	none := issued{}
	account, err := f.node.client.CoreV1().ServiceAccounts(f.pod.Namespace).Get(
		ctx, f.pod.Spec.ServiceAccountName, meta.GetOptions{})
	if err != nil {
		return none, err
	}
	node, err := f.node.client.CoreV1().Nodes().Get(ctx, f.node.name, meta.GetOptions{})
	if err != nil {
		return none, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return none, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return none, err
	}
	proof, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return none, err
	}
	requests := f.node.kubelet.CertificatesV1beta1().PodCertificateRequests(f.pod.Namespace)
	made, err := requests.Create(ctx, &certificates.PodCertificateRequest{
		ObjectMeta: meta.ObjectMeta{
			GenerateName:    "req-",
			OwnerReferences: []meta.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: f.pod.Name, UID: f.pod.UID}},
		},
		Spec: certificates.PodCertificateRequestSpec{
			SignerName: source.SignerName, PodName: f.pod.Name, PodUID: f.pod.UID,
			ServiceAccountName: account.Name, ServiceAccountUID: account.UID, NodeName: types.NodeName(node.Name), NodeUID: node.UID,
			MaxExpirationSeconds: source.MaxExpirationSeconds, StubPKCS10Request: proof,
			UnverifiedUserAnnotations: source.UserAnnotations,
		},
	}, meta.CreateOptions{})
	if err != nil {
		return none, err
	}
	for deadline := time.Now().Add(signersTime); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		now, err := requests.Get(ctx, made.Name, meta.GetOptions{})
		if err != nil {
			continue // the authorizer learns from a watch whose request it is
		}
		for _, condition := range now.Status.Conditions {
			if condition.Type != certificates.PodCertificateRequestConditionTypeIssued {
				return none, fmt.Errorf("%s is %s: %s", made.Name, condition.Type, condition.Message)
			}
			bundle := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
			bundle = append(bundle, now.Status.CertificateChain...)
			return issued{bundle, made.Name, now.Status.BeginRefreshAt.Time}, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return none, fmt.Errorf("%s has no certificate yet", made.Name)
}

// clusterTrustBundle gives the anchors of all bundles of a signer, or of one by its name.
func (f *files) clusterTrustBundle(
	ctx context.Context, found map[string]file, source *core.ClusterTrustBundleProjection, mode os.FileMode,
) error {
	bundles := f.node.kubelet.CertificatesV1beta1().ClusterTrustBundles()
	options := meta.ListOptions{}
	if source.Name != nil {
		options.FieldSelector = "metadata.name=" + *source.Name
	} else {
		options.FieldSelector = "spec.signerName=" + *source.SignerName
		options.LabelSelector = meta.FormatLabelSelector(source.LabelSelector)
		if source.LabelSelector != nil && len(source.LabelSelector.MatchLabels)+len(source.LabelSelector.MatchExpressions) == 0 {
			options.LabelSelector = ""
		}
	}
	list, err := bundles.List(ctx, options)
	if err != nil {
		return err
	}
	var anchors [][]byte
	for _, one := range list.Items {
		anchors = append(anchors, []byte(one.Spec.TrustBundle))
	}
	if len(anchors) == 0 {
		return fmt.Errorf("no ClusterTrustBundle is selected")
	}
	found[source.Path] = file{bytes.Join(anchors, []byte("\n")), mode}
	return nil
}
