-- Fixes the bytes of an event before they are sent for the first time. ARGV: event, token, body.
-- Returns the body to send, or false if another sender has the event.
local event, token, body = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', event_key(event), 'token') ~= token then return false end
redis.call('HSETNX', event_key(event), 'body', body)
redis.call('HDEL', event_key(event), 'job')
return redis.call('HGET', event_key(event), 'body')
