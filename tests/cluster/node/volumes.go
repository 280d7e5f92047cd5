package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// file is what a volume has under one name.
type file struct {
	data []byte
	mode os.FileMode
}

// volumes are the directories of a pod's volumes, by the volume's name; an empty directory is one in memory.
type volumes map[string]string

// tokenShare of a token's life is when the kubelet asks for the next one.
const tokenShare = 0.8

// makeVolumes writes every volume once. An object that is not there (yet) is an error, and the pod waits, as at a kubelet.
func (n *node) makeVolumes(ctx context.Context, object *core.Pod, root string) (volumes, *refresher, error) {
	made, again := volumes{}, &refresher{}
	for _, volume := range object.Spec.Volumes {
		directory := filepath.Join(root, volume.Name)
		if empty := volume.EmptyDir; empty != nil {
			if empty.Medium == core.StorageMediumMemory {
				directory = ""
			} else if err := makeOwned(directory, object, 0o777); err != nil {
				return nil, nil, err
			}
			made[volume.Name] = directory
			continue
		}
		if claim := volume.PersistentVolumeClaim; claim != nil {
			// A directory that outlives the pod stands for whatever a provisioner would have bound.
			if _, err := n.client.CoreV1().PersistentVolumeClaims(object.Namespace).Get(
				ctx, claim.ClaimName, meta.GetOptions{}); err != nil {
				return nil, nil, err
			}
			directory = filepath.Join(n.root+"-claims", object.Namespace, claim.ClaimName)
			if err := makeOwned(directory, object, os.ModeSetgid|0o775); err != nil {
				return nil, nil, err
			}
			made[volume.Name] = directory
			continue
		}
		if err := makeOwned(directory, object, 0o755); err != nil {
			return nil, nil, err
		}
		source := &files{node: n, pod: object, volume: volume, directory: directory}
		if err := source.write(ctx); err != nil {
			return nil, nil, fmt.Errorf("volume %s: %w", volume.Name, err)
		}
		again.files = append(again.files, source)
		made[volume.Name] = directory
	}
	return made, again, nil
}

// refresher brings changes of ConfigMaps and Secrets, and new tokens, to a pod that runs.
type refresher struct{ files []*files }

// refreshEvery is a minute at a kubelet.
const refreshEvery = 2 * time.Second

func (r *refresher) run(ctx context.Context, report func(error)) {
	tick := time.NewTicker(refreshEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, source := range r.files {
			if err := source.write(ctx); err != nil && ctx.Err() == nil {
				report(err)
			}
		}
	}
}

// files is one volume whose files come from the API server.
type files struct {
	node        *node
	pod         *core.Pod
	volume      core.Volume
	directory   string
	written     map[string]file
	token       map[string]token
	certificate map[string]issued
	number      int
}

type token struct {
	text  string
	renew time.Time
}

// write brings the directory up to date, all files at once: readers follow the link `..data`, which is replaced, as in
// a kubelet's volume.
func (f *files) write(ctx context.Context) error {
	now, err := f.read(ctx)
	if err != nil {
		return err
	}
	if f.written != nil && sameFiles(now, f.written) {
		return nil
	}
	f.number++
	version := fmt.Sprintf("..%d", f.number)
	for name, content := range now {
		path := filepath.Join(f.directory, version, name)
		if err := makeOwned(filepath.Dir(path), f.pod, 0o755); err != nil {
			return err
		}
		mode := content.mode
		if security := f.pod.Spec.SecurityContext; security != nil && security.FSGroup != nil {
			mode |= mode >> 3 & 0o040 // the group may read
			mode |= 0o040
		}
		if err := os.WriteFile(path, content.data, mode); err != nil {
			return err
		}
		if err := own(path, f.pod, mode); err != nil {
			return err
		}
	}
	if err := makeOwned(filepath.Join(f.directory, version), f.pod, 0o755); err != nil {
		return err
	}
	fresh := filepath.Join(f.directory, "..data_tmp")
	if err := os.Symlink(version, fresh); err != nil {
		return err
	}
	if err := os.Rename(fresh, filepath.Join(f.directory, "..data")); err != nil {
		return err
	}
	for name := range now {
		first, _, _ := cutPath(name)
		_ = os.Symlink(filepath.Join("..data", first), filepath.Join(f.directory, first)) // the second time it is there
	}
	for name := range f.written {
		if _, still := now[name]; !still {
			first, _, _ := cutPath(name)
			_ = os.Remove(filepath.Join(f.directory, first))
		}
	}
	_ = os.RemoveAll(filepath.Join(f.directory, fmt.Sprintf("..%d", f.number-1)))
	f.written = now
	return nil
}

func cutPath(name string) (first, rest string, found bool) {
	for i := range name {
		if name[i] == '/' {
			return name[:i], name[i+1:], true
		}
	}
	return name, "", false
}

func sameFiles(a, b map[string]file) bool {
	if len(a) != len(b) {
		return false
	}
	for name, one := range a {
		if other, ok := b[name]; !ok || one.mode != other.mode || !slices.Equal(one.data, other.data) {
			return false
		}
	}
	return true
}

func (f *files) read(ctx context.Context) (map[string]file, error) {
	found := map[string]file{}
	switch v := f.volume; {
	case v.ConfigMap != nil:
		return found, f.configMap(ctx, found, v.ConfigMap.Name, v.ConfigMap.Items, v.ConfigMap.Optional,
			modeOf(v.ConfigMap.DefaultMode))
	case v.Secret != nil:
		return found, f.secret(ctx, found, v.Secret.SecretName, v.Secret.Items, v.Secret.Optional,
			modeOf(v.Secret.DefaultMode))
	case v.Projected != nil:
		mode := modeOf(v.Projected.DefaultMode)
		for _, source := range v.Projected.Sources {
			if err := f.projected(ctx, found, source, mode); err != nil {
				return nil, err
			}
		}
		return found, nil
	case v.DownwardAPI != nil:
		return found, f.downward(found, v.DownwardAPI.Items, modeOf(v.DownwardAPI.DefaultMode))
	}
	return nil, fmt.Errorf("this node has no volumes of its kind")
}

func (f *files) projected(ctx context.Context, found map[string]file, source core.VolumeProjection, mode os.FileMode) error {
	switch {
	case source.ConfigMap != nil:
		return f.configMap(ctx, found, source.ConfigMap.Name, source.ConfigMap.Items, source.ConfigMap.Optional, mode)
	case source.Secret != nil:
		return f.secret(ctx, found, source.Secret.Name, source.Secret.Items, source.Secret.Optional, mode)
	case source.DownwardAPI != nil:
		return f.downward(found, source.DownwardAPI.Items, mode)
	case source.ServiceAccountToken != nil:
		return f.serviceAccountToken(ctx, found, source.ServiceAccountToken, mode)
	case source.PodCertificate != nil:
		return f.podCertificate(ctx, found, source.PodCertificate, mode)
	case source.ClusterTrustBundle != nil:
		return f.clusterTrustBundle(ctx, found, source.ClusterTrustBundle, mode)
	}
	return fmt.Errorf("this node has no projected volumes of its kind")
}

func (f *files) configMap(
	ctx context.Context, found map[string]file, name string, items []core.KeyToPath, optional *bool, mode os.FileMode,
) error {
	object, err := f.node.client.CoreV1().ConfigMaps(f.pod.Namespace).Get(ctx, name, meta.GetOptions{})
	if apierrors.IsNotFound(err) && optional != nil && *optional {
		return nil
	}
	if err != nil {
		return err
	}
	data := map[string][]byte{}
	for key, value := range object.Data {
		data[key] = []byte(value)
	}
	for key, value := range object.BinaryData {
		data[key] = value
	}
	return choose(found, data, items, optional, mode, "ConfigMap "+name)
}

func (f *files) secret(
	ctx context.Context, found map[string]file, name string, items []core.KeyToPath, optional *bool, mode os.FileMode,
) error {
	object, err := f.node.client.CoreV1().Secrets(f.pod.Namespace).Get(ctx, name, meta.GetOptions{})
	if apierrors.IsNotFound(err) && optional != nil && *optional {
		return nil
	}
	if err != nil {
		return err
	}
	return choose(found, object.Data, items, optional, mode, "Secret "+name)
}

// choose takes all keys, or those that are named.
func choose(
	found map[string]file, data map[string][]byte, items []core.KeyToPath, optional *bool, mode os.FileMode, where string,
) error {
	if items == nil {
		for key, value := range data {
			found[key] = file{value, mode}
		}
		return nil
	}
	for _, item := range items {
		value, there := data[item.Key]
		if !there {
			if optional != nil && *optional {
				continue
			}
			return fmt.Errorf("%s has no key %s", where, item.Key)
		}
		own := mode
		if item.Mode != nil {
			own = modeOf(item.Mode)
		}
		found[item.Path] = file{value, own}
	}
	return nil
}

func (f *files) downward(found map[string]file, items []core.DownwardAPIVolumeFile, mode os.FileMode) error {
	for _, item := range items {
		if item.FieldRef == nil {
			return fmt.Errorf("this node knows no resource fields")
		}
		value, err := fieldOf(f.pod, item.FieldRef.FieldPath)
		if err != nil {
			return err
		}
		found[item.Path] = file{[]byte(value), mode}
	}
	return nil
}

// serviceAccountToken is bound to the pod, as a kubelet's is: it dies with it.
func (f *files) serviceAccountToken(
	ctx context.Context, found map[string]file, source *core.ServiceAccountTokenProjection, mode os.FileMode,
) error {
	kept, there := f.token[source.Path]
	if !there || time.Now().After(kept.renew) {
		seconds := int64(3600)
		if source.ExpirationSeconds != nil {
			seconds = *source.ExpirationSeconds
		}
		request := &authentication.TokenRequest{Spec: authentication.TokenRequestSpec{
			ExpirationSeconds: &seconds,
			BoundObjectRef: &authentication.BoundObjectReference{
				APIVersion: "v1", Kind: "Pod", Name: f.pod.Name, UID: f.pod.UID,
			},
		}}
		if source.Audience != "" {
			request.Spec.Audiences = []string{source.Audience}
		}
		answer, err := f.node.client.CoreV1().ServiceAccounts(f.pod.Namespace).CreateToken(
			ctx, f.pod.Spec.ServiceAccountName, request, meta.CreateOptions{})
		if err != nil {
			return err
		}
		life := time.Until(answer.Status.ExpirationTimestamp.Time)
		kept = token{answer.Status.Token, time.Now().Add(time.Duration(float64(life) * tokenShare))}
		if f.token == nil {
			f.token = map[string]token{}
		}
		f.token[source.Path] = kept
	}
	if f.pod.Spec.SecurityContext != nil && f.pod.Spec.SecurityContext.FSGroup != nil {
		mode = 0o600 // a kubelet gives it to the user who runs, or to the group
	}
	found[source.Path] = file{[]byte(kept.text), mode}
	return nil
}

func modeOf(mode *int32) os.FileMode {
	if mode == nil {
		return 0o644
	}
	return os.FileMode(*mode)
}

// makeOwned makes a directory that the pod's group may enter.
func makeOwned(path string, object *core.Pod, mode os.FileMode) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	return own(path, object, mode)
}

func own(path string, object *core.Pod, mode os.FileMode) error {
	if security := object.Spec.SecurityContext; security != nil && security.FSGroup != nil {
		if err := os.Chown(path, 0, int(*security.FSGroup)); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode)
}

// fieldOf is a field of the downward API.
func fieldOf(object *core.Pod, path string) (string, error) {
	switch path {
	case "metadata.name":
		return object.Name, nil
	case "metadata.namespace":
		return object.Namespace, nil
	case "metadata.uid":
		return string(object.UID), nil
	case "spec.nodeName":
		return object.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return object.Spec.ServiceAccountName, nil
	case "status.podIP", "status.hostIP":
		return "127.0.0.1", nil
	}
	return "", fmt.Errorf("this node does not know the field %s", path)
}
