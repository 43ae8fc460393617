"""Android devices: the adb client, what they tell of themselves, and the agent that they are sent."""
