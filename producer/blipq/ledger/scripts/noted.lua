-- Runs a script, and notes in the log of actions what it did: both or neither. The last argument is
-- what to note, as JSON: {name, via, action, target, script}.
local LOG_TTL = 30 * DAY
local MOST_NOTED = 10000

local note = cjson.decode(table.remove(ARGV))

local function act()
--SCRIPT--
end

-- How many jobs, events or queues it came to. An action that came to none is not noted.
local COUNTS = {
  cancel = function(answer) return answer == 'cancelled' and 1 or 0 end,
  change = function(answer) return #answer[3] end,
  forget = function(answer) return #answer end,
  pause = function(answer) return answer[1] >= 0 and 1 or 0 end,
}
local function count_of(answer)
  local count = COUNTS[note.script]
  return count and count(answer) or tonumber(answer)
end

local answer = act()
local count = count_of(answer)
if count > 0 then
  redis.call('XADD', ACTIONS, 'MAXLEN', '~', MOST_NOTED, '*', 'name', note.name, 'via', note.via,
    'action', note.action, 'target', note.target, 'count', count)
  redis.call('XTRIM', ACTIONS, 'MINID', '~', string.format('%d', now - LOG_TTL))
  redis.call('PEXPIRE', ACTIONS, LOG_TTL)
end
return answer
