// Uploads a picture, and has a job of each kind done, with Go's standard library alone:
//
//	blipq up &
//	BLIPQ_KEY=... go run jobs.go cat.png
//
// BLIPQ_URL names another door, and BLIPQ_KEY is sent as its key. Prints each result as a line of
// JSON; exit code 1 with the problem if one fails.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

const longestWait = 5 * time.Minute

var client = http.Client{Timeout: 90 * time.Second}

type object map[string]any

// call sends one request, and reads its answer into "into". A problem is an error.
func call(method, path, contentType string, body []byte, into any) error {
	url := os.Getenv("BLIPQ_URL")
	if url == "" {
		url = "http://127.0.0.1:8321"
	}
	request, err := http.NewRequest(method, url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	if key := os.Getenv("BLIPQ_KEY"); key != "" {
		request.Header.Set("Authorization", "Bearer "+key)
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode >= 400 {
		var problem struct{ Code, Detail string }
		if err := json.Unmarshal(text, &problem); err != nil {
			return fmt.Errorf("%s: %s", answer.Status, text)
		}
		return fmt.Errorf("%s: %s", problem.Code, problem.Detail)
	}
	return json.Unmarshal(text, into)
}

type job struct {
	ID, Status string
	Result     json.RawMessage
}

// run submits a job, and waits for its end.
func run(asked object) (json.RawMessage, error) {
	body, err := json.Marshal(asked)
	if err != nil {
		return nil, err
	}
	var info job
	err = call("POST", "/v1/jobs?wait=30", "application/json", body, &info)
	until := time.Now().Add(longestWait)
	for err == nil && (info.Status == "queued" || info.Status == "running") && time.Now().Before(until) {
		err = call("GET", "/v1/jobs/"+info.ID+"?wait=30", "", nil, &info)
	}
	if err == nil && info.Status != "succeeded" {
		err = fmt.Errorf("%s %s", info.ID, info.Status)
	}
	return info.Result, err
}

func all(file string) error {
	picture, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var uploaded struct{ URI string }
	if err := call("POST", "/v1/uploads", "image/png", picture, &uploaded); err != nil {
		return err
	}
	image := uploaded.URI
	jobs := []object{
		{"kind": "caption", "image": image},
		{"kind": "vqa", "image": image, "questions": []string{"what color is it?"}},
		{"kind": "match", "image": image, "texts": []string{"a red square", "a dog"}},
		{"kind": "describe", "image": image, "questions": []string{"what is it?"}},
		{"kind": "embed", "image": image, "index": "example-go"},
		{"kind": "search", "index": "example-go", "text": "a red square"},
	}
	for _, each := range jobs {
		result, err := run(each)
		if err != nil {
			return err
		}
		fmt.Println(string(result))
	}
	return nil
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run jobs.go PICTURE")
		os.Exit(2)
	}
	if err := all(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
