// Sends a message of each type with Segment's SDK: node send.mjs <host>, and the write key on stdin.
import { readFileSync } from "node:fs";
import { Analytics } from "@segment/analytics-node";

const errors = [];
const analytics = new Analytics({ writeKey: readFileSync(0, "utf8"), host: process.argv[2], maxRetries: 0 });
analytics.on("error", (error) => errors.push(error));
const anonymousId = "anonymous-ada";
analytics.identify({ userId: "ada", anonymousId, traits: { plan: "pro", address: { city: "London" } } });
analytics.track({ userId: "ada", event: "Bought", properties: { price: 3.5, goods: ["a", "b"] } });
analytics.track({ anonymousId, event: "Seen", messageId: "once" });
analytics.track({ anonymousId, event: "Seen", messageId: "once" });
analytics.page({ userId: "ada", name: "Home", properties: { url: "https://x.example/home" } });
analytics.screen({ userId: "ada", name: "Start" });
analytics.group({ userId: "ada", groupId: "7", traits: { seats: 5 } });
analytics.alias({ userId: "ada", previousId: "older-ada" });
await analytics.closeAndFlush();
if (errors.length > 0) {
  console.error(errors);
  process.exit(1);
}
