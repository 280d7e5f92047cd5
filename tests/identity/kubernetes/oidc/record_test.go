// Records what Kubernetes' OIDC authenticator makes of configurations and tokens, one JSON line for each case.
//
// This file is compiled into a copy of k8s.io/apiserver/plugin/pkg/authenticator/token/oidc beside that package's own
// test, whose `run` calls recordRun (tests/identity/kubernetes/recording.py puts the call there). Every verdict is that
// of the running code: strict decoding, ValidateAuthenticationConfiguration, New and AuthenticateToken.

package oidc

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"gopkg.in/go-jose/go-jose.v2"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	runtimejson "k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/apis/apiserver/install"
	v1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/apis/apiserver/validation"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	authenticationcel "k8s.io/apiserver/pkg/authentication/cel"
)

type recordedUser struct {
	Username string              `json:"username"`
	UID      string              `json:"uid"`
	Groups   []string            `json:"groups"`
	Extra    map[string][]string `json:"extra"`
}

type recordedToken struct {
	Name  string        `json:"name"`
	Token string        `json:"token"`
	User  *recordedUser `json:"user"` // null: refused
	Error string        `json:"error"`
}

type recordedCase struct {
	Suite      string            `json:"suite"`
	Name       string            `json:"name"`
	Config     string            `json:"config"`
	FileError  string            `json:"file_error"` // empty: the file is accepted
	Now        int64             `json:"now"`
	Algorithms []string          `json:"algorithms"`
	Documents  map[string]string `json:"documents"` // by URL
	Tokens     []recordedToken   `json:"tokens"`
}

func writeCase(t *testing.T, one recordedCase) {
	t.Helper()
	line, err := json.Marshal(one)
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

var recordScheme = func() *runtime.Scheme {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	return scheme
}()
var recordCodecs = serializer.NewCodecFactory(recordScheme, serializer.EnableStrict)

func encodeConfig(t *testing.T, config *apiserver.AuthenticationConfiguration) string {
	t.Helper()
	plain := runtimejson.NewSerializerWithOptions(runtimejson.DefaultMetaFactory, recordScheme, recordScheme, runtimejson.SerializerOptions{})
	data, err := runtime.Encode(recordCodecs.EncoderForVersion(plain, v1.SchemeGroupVersion), config)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func judgeFile(text string) (*apiserver.AuthenticationConfiguration, string) {
	decoded, err := runtime.Decode(recordCodecs.UniversalDecoder(), []byte(text))
	if err != nil {
		return nil, err.Error()
	}
	config, ok := decoded.(*apiserver.AuthenticationConfiguration)
	if !ok {
		return nil, "another kind"
	}
	if err := validation.ValidateAuthenticationConfiguration(authenticationcel.NewDefaultCompiler(), config, nil).ToAggregate(); err != nil {
		return nil, err.Error()
	}
	return config, ""
}

func judgeToken(name string, a authenticator.Token, token string) recordedToken {
	found := recordedToken{Name: name, Token: token}
	response, ok, err := a.AuthenticateToken(context.Background(), token)
	switch {
	case err != nil:
		found.Error = err.Error()
	case !ok:
		found.Error = "not a token of this issuer"
	default:
		user := response.User
		found.User = &recordedUser{user.GetName(), user.GetUID(), user.GetGroups(), user.GetExtra()}
	}
	return found
}

// recordRun records a case of the package's own test: its file, and its token as it is and with the claims that
// arcbridge wants of every token.
func recordRun(t *testing.T, c *claimsTest, a authenticator.Token, signer jose.Signer, url string) {
	config := encodeConfig(t, &apiserver.AuthenticationConfiguration{JWT: []apiserver.JWTAuthenticator{c.options.JWTAuthenticator}})
	_, refused := judgeFile(config)
	one := recordedCase{Suite: "TestToken", Name: c.name, Config: config, FileError: refused, Now: now.Unix(), Documents: map[string]string{}}
	one.Algorithms = c.options.SupportedSigningAlgs
	if len(one.Algorithms) == 0 {
		one.Algorithms = []string{string(jose.RS256)}
	}
	keys, err := json.Marshal(toKeySet(c.pubKeys))
	if err != nil {
		t.Fatal(err)
	}
	issuer := c.options.JWTAuthenticator.Issuer
	discovery := issuer.DiscoveryURL
	if discovery == "" {
		discovery = strings.TrimSuffix(issuer.URL, "/") + wellKnownEndpointPath
	}
	if c.fetchKeysFromRemote {
		one.Documents[discovery] = c.openIDConfig
		one.Documents[url+"/.testing/keys"] = string(keys)
	} else {
		one.Documents[discovery] = fmt.Sprintf(`{"issuer":%q,"jwks_uri":"https://keys.example/"}`, issuer.URL)
		one.Documents["https://keys.example/"] = string(keys)
	}
	sign := func(payload []byte) string {
		jws, err := signer.Sign(payload)
		if err != nil {
			t.Fatal(err)
		}
		token, err := jws.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	// A client that fails is no part of the file: then nothing answers.
	failing := false
	if c.options.Client != nil {
		_, failing = c.options.Client.Transport.(errTransport)
	}
	if signer != nil && !failing {
		for claim, response := range c.claimToResponseMap {
			one.Documents[url+"/"+claim] = sign([]byte(response))
		}
	}
	if a != nil && signer != nil {
		claims := map[string]json.RawMessage{}
		if err := json.Unmarshal([]byte(c.claims), &claims); err == nil {
			one.Tokens = append(one.Tokens, judgeToken("as it is", a, sign([]byte(c.claims))))
			for name, value := range map[string]string{"sub": `"a-subject"`, "iat": fmt.Sprint(now.Unix() - 60)} {
				if _, there := claims[name]; !there {
					claims[name] = json.RawMessage(value)
				}
			}
			payload, err := json.Marshal(claims)
			if err != nil {
				t.Fatal(err)
			}
			one.Tokens = append(one.Tokens, judgeToken("with sub and iat", a, sign(payload)))
		}
	}
	writeCase(t, one)
}

// A case of tests/identity/kubernetes/cases.yaml. Header, payload and key set are texts, so that they can be malformed.
type ownCase struct {
	Name      string            `json:"name"`
	Config    string            `json:"config"`
	Header    string            `json:"header"`
	Payload   string            `json:"payload"`
	Keys      string            `json:"keys"`
	Padded    int               `json:"padded"`
	Tail      string            `json:"tail"`
	Documents map[string]string `json:"documents"`
	Signed    map[string]string `json:"signed"`
	Now       int64             `json:"now"`
}

type documents map[string]string

func (d documents) RoundTrip(request *http.Request) (*http.Response, error) {
	body, there := d[request.URL.String()]
	response := &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: request}
	response.Header.Set("Content-Type", "application/json")
	if !there {
		response.StatusCode = 404
	}
	return response, nil
}

var edKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32))

func signRaw(t *testing.T, key *rsa.PrivateKey, header, payload string, padded int) string {
	t.Helper()
	parts := []string{base64.RawURLEncoding.EncodeToString([]byte(header)), base64.RawURLEncoding.EncodeToString([]byte(payload))}
	if padded == 1 || padded == 2 {
		parts[padded-1] = base64.URLEncoding.EncodeToString([]byte([]string{header, payload}[padded-1]))
	}
	signed := strings.Join(parts, ".")
	var signature []byte
	var err error
	digest := sha256.Sum256([]byte(signed))
	switch {
	case strings.Contains(header, `"EdDSA"`):
		signature = ed25519.Sign(edKey, []byte(signed))
	case strings.Contains(header, `"PS256"`):
		signature, err = rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	default:
		signature, err = rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
	}
	if err != nil {
		t.Fatal(err)
	}
	if padded == 3 {
		return signed + "." + base64.URLEncoding.EncodeToString(signature)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func TestRecordOwn(t *testing.T) {
	synchronizeTokenIDVerifierForTest = true
	data, err := os.ReadFile("../own.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []ownCase
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	key := loadRSAPrivKey(t, "testdata/rsa_1.pem", jose.RS256).Key.(*rsa.PrivateKey)
	public := strings.NewReplacer(
		"{{RSA}}", members(t, jose.JSONWebKey{Key: &key.PublicKey}), "{{ED}}", members(t, jose.JSONWebKey{Key: edKey.Public()}))
	for _, own := range cases {
		t.Run(own.Name, func(t *testing.T) {
			one := recordedCase{Suite: "own", Name: own.Name, Config: own.Config, Now: own.Now, Algorithms: AllValidSigningAlgorithms(), Documents: documents{}}
			config, refused := judgeFile(own.Config)
			one.FileError = refused
			if refused != "" || own.Payload == "" {
				writeCase(t, one)
				return
			}
			issuer := config.JWT[0].Issuer.URL
			one.Documents[strings.TrimSuffix(issuer, "/")+wellKnownEndpointPath] = fmt.Sprintf(`{"issuer":%q,"jwks_uri":"https://keys.example/"}`, issuer)
			one.Documents["https://keys.example/"] = public.Replace(own.Keys)
			for url, payload := range own.Signed {
				one.Documents[url] = signRaw(t, key, `{"alg":"RS256","kid":"k1"}`, payload, 0)
			}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			a, err := New(ctx, Options{
				JWTAuthenticator:     config.JWT[0],
				Client:               &http.Client{Transport: documents(one.Documents)},
				SupportedSigningAlgs: one.Algorithms,
				now:                  func() time.Time { return time.Unix(own.Now, 0) },
			})
			if err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(time.Minute); a.HealthCheck() != nil; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal(a.HealthCheck())
				}
			}
			one.Tokens = append(one.Tokens, judgeToken("own", a, signRaw(t, key, own.Header, own.Payload, own.Padded)+own.Tail))
			writeCase(t, one)
		})
	}
}

func members(t *testing.T, key jose.JSONWebKey) string {
	t.Helper()
	data, err := key.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Trim(string(data), "{}")
}
