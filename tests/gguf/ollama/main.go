// Renders conversations by a Go template with the values that Ollama gives it:
// go run main.go job.json, where the job is {"template": ..., "conversations": [[message]]}.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// As in Ollama's template.go: system messages are also joined to one text, and neighbours of the
// same role become one message.
func collate(messages []Message) (string, []*Message) {
	var system []string
	var collated []*Message
	for i := range messages {
		message := messages[i]
		if message.Role == "system" {
			system = append(system, message.Content)
		}
		if n := len(collated); n > 0 && collated[n-1].Role == message.Role {
			collated[n-1].Content += "\n\n" + message.Content
		} else {
			collated = append(collated, &message)
		}
	}
	return strings.Join(system, "\n\n"), collated
}

func main() {
	var job struct {
		Template      string      `json:"template"`
		Conversations [][]Message `json:"conversations"`
	}
	text, err := os.ReadFile(os.Args[1])
	if err == nil {
		err = json.Unmarshal(text, &job)
	}
	if err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(job.Template))
	rendered := []string{}
	for _, conversation := range job.Conversations {
		system, messages := collate(conversation)
		var out strings.Builder
		if err := parsed.Execute(&out, map[string]any{"System": system, "Messages": messages}); err != nil {
			panic(err)
		}
		rendered = append(rendered, out.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil {
		panic(err)
	}
}
