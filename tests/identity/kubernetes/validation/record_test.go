// Records the configurations of Kubernetes' tests of validation as files, and whether the API server accepts them.
//
// This file is compiled into a copy of k8s.io/apiserver/pkg/apis/apiserver/validation beside that package's own test,
// whose loops call recordRow. A row is a part of a configuration; the rest of the file is as small as it can be.

package validation

import (
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"
	"unsafe"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	runtimejson "k8s.io/apimachinery/pkg/runtime/serializer/json"
	api "k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/apis/apiserver/install"
	v1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	authenticationcel "k8s.io/apiserver/pkg/authentication/cel"
)

func recordRow(t *testing.T, row any) {
	t.Helper()
	value := reflect.New(reflect.TypeOf(row)).Elem()
	value.Set(reflect.ValueOf(row))
	field := func(name string) any {
		found := value.FieldByName(name)
		if !found.IsValid() {
			return nil
		}
		return reflect.NewAt(found.Type(), unsafe.Pointer(found.UnsafeAddr())).Elem().Interface()
	}
	prefix := ""
	entry := api.JWTAuthenticator{
		Issuer:        api.Issuer{URL: "https://issuer.example", Audiences: []string{"audience"}},
		ClaimMappings: api.ClaimMappings{Username: api.PrefixedClaimOrExpression{Claim: "sub", Prefix: &prefix}},
	}
	suite, _, _ := strings.Cut(t.Name(), "/")
	config := &api.AuthenticationConfiguration{JWT: []api.JWTAuthenticator{entry}}
	issuer, jwt := &config.JWT[0].Issuer, &config.JWT[0]
	switch in := field("in").(type) {
	case *api.AuthenticationConfiguration:
		config = in
	case string:
		if suite == "TestValidateIssuerDiscoveryURL" {
			issuer.DiscoveryURL = in
			if url := field("issuerURL").(string); url != "" {
				issuer.URL = url
			}
		} else {
			issuer.URL = in
		}
	case []string:
		issuer.Audiences, issuer.AudienceMatchPolicy = in, api.AudienceMatchPolicyType(field("matchPolicy").(string))
	case func() string:
		issuer.CertificateAuthority = in()
	case []api.ClaimValidationRule:
		jwt.ClaimValidationRules = in
	case api.ClaimMappings:
		jwt.ClaimMappings = in
	case []api.UserValidationRule:
		jwt.UserValidationRules = in
	default:
		t.Fatalf("a row of an unknown kind: %T", in)
	}
	if config == nil {
		return // no file
	}
	scheme := runtime.NewScheme()
	install.Install(scheme)
	codecs := serializer.NewCodecFactory(scheme, serializer.EnableStrict)
	plain := runtimejson.NewSerializerWithOptions(runtimejson.DefaultMetaFactory, scheme, scheme, runtimejson.SerializerOptions{})
	text, err := runtime.Encode(codecs.EncoderForVersion(plain, v1.SchemeGroupVersion), config)
	if err != nil {
		t.Fatal(err)
	}
	refused := ""
	decoded, err := runtime.Decode(codecs.UniversalDecoder(), text)
	if err != nil {
		refused = err.Error()
	} else if err := ValidateAuthenticationConfiguration(authenticationcel.NewDefaultCompiler(), decoded.(*api.AuthenticationConfiguration), nil).ToAggregate(); err != nil {
		refused = err.Error()
	}
	line, err := json.Marshal(map[string]any{"suite": suite, "name": field("name"), "config": string(text), "file_error": refused})
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile("../recording.jsonl", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(append(line, '\n')); err != nil {
		t.Fatal(err)
	}
}
