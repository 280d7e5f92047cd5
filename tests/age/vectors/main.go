// Prints C2SP's vectors of age's format, as one JSON object: the text of each file in base64, by its name.
package main

import (
	"encoding/json"
	"io/fs"
	"log"
	"os"

	agetest "c2sp.org/CCTV/age"
)

func main() {
	entries, err := fs.ReadDir(agetest.Vectors, ".")
	if err != nil {
		log.Fatal(err)
	}
	vectors := map[string][]byte{}
	for _, entry := range entries {
		vectors[entry.Name()], err = fs.ReadFile(agetest.Vectors, entry.Name())
		if err != nil {
			log.Fatal(err)
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(vectors); err != nil {
		log.Fatal(err)
	}
}
