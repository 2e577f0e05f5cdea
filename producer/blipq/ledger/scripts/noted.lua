-- Runs a script, and notes in the log of actions what it did: both or neither. The last argument is
-- what to note, as JSON: {name, via, action, target, script, command}. Parts of one command have its id.
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

-- The line of the command's former parts is taken out, and the new one goes on with its count and
-- target: a line cannot be changed. RECENT: more commands than run at a time.
local RECENT = 50
local function go_on(count)
  local line = {'name', note.name, 'via', note.via, 'action', note.action}
  local target = note.target
  if note.command then
    line[#line + 1], line[#line + 2] = 'command', note.command
    for _, entry in ipairs(redis.call('XREVRANGE', ACTIONS, '+', '-', 'COUNT', RECENT)) do
      local old = {}
      for i = 1, #entry[2], 2 do old[entry[2][i]] = entry[2][i + 1] end
      if old.command == note.command then
        count, target = count + old.count, old.target
        redis.call('XDEL', ACTIONS, entry[1])
        break
      end
    end
  end
  line[#line + 1], line[#line + 2] = 'target', target
  line[#line + 1], line[#line + 2] = 'count', string.format('%d', count)
  return line
end

local answer = act()
local count = count_of(answer)
if count > 0 then
  redis.call('XADD', ACTIONS, 'MAXLEN', '~', MOST_NOTED, '*', unpack(go_on(count)))
  redis.call('XTRIM', ACTIONS, 'MINID', '~', string.format('%d', now - LOG_TTL))
  redis.call('PEXPIRE', ACTIONS, LOG_TTL)
end
return answer
