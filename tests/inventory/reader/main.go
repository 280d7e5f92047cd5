// A program that reads an inventory of clusters as tools do: sigs.k8s.io/cluster-inventory-api and client-go alone.
//
// Its input is a ClusterProfileList, its argument the file of access providers. For each profile with a way to its
// cluster it prints one line: the name, who it is there (SelfSubjectReview), and the number of pods in `default`.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	authentication "k8s.io/api/authentication/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/cluster-inventory-api/apis/v1alpha1"
	"sigs.k8s.io/cluster-inventory-api/pkg/access"
)

func main() {
	if err := read(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func read(ctx context.Context, providers string) error {
	var profiles v1alpha1.ClusterProfileList
	decoder := json.NewDecoder(os.Stdin)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&profiles); err != nil {
		return fmt.Errorf("the list of profiles: %w", err)
	}
	for i := range profiles.Items {
		profile := &profiles.Items[i]
		if len(profile.Status.AccessProviders) == 0 {
			continue
		}
		// Read anew for each profile: arguments that a profile brings are added to what was read.
		known, err := access.NewFromFile(providers)
		if err != nil {
			return err
		}
		config, err := known.BuildConfigFromCP(profile)
		if err != nil {
			return err
		}
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			return err
		}
		review, err := client.AuthenticationV1().SelfSubjectReviews().Create(
			ctx, &authentication.SelfSubjectReview{}, meta.CreateOptions{})
		if err != nil {
			return fmt.Errorf("%s: %w", profile.Name, err)
		}
		pods, err := client.CoreV1().Pods("default").List(ctx, meta.ListOptions{})
		if err != nil {
			return fmt.Errorf("%s: %w", profile.Name, err)
		}
		fmt.Println(profile.Name, review.Status.UserInfo.Username, len(pods.Items))
	}
	return nil
}
